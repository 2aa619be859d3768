"""Prefetching by threads or worker processes that take turns.

Results come in the order of the turns, so they do not depend on which worker is faster. (The worker processes of grain
were tried: they leave shared memory behind if a run ends without closing them, and need ``/dev/shm`` for all prefetched
batches, which is small in containers.)
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker, util
from typing import Any, TypeVar

from diffuse_jax.training.interruption import shielded

T = TypeVar("T")

AHEAD = 2
"""Number of results that each worker prefetches."""


def in_turns(shares: Sequence[Iterable[T]], processes: bool) -> Generator[T, None, None]:
    """The first item of every share, then the second of every share, and so on; shares are endless.

    The workers end when the iterator is closed, and when the program ends or is killed. They ignore signals to the
    whole process group, such as Ctrl-C: the program decides when it needs no more items.

    Args:
      shares: what each worker iterates over; they must be picklable if the workers are processes.
      processes: whether the workers are processes or threads of this process.

    Raises:
      RuntimeError: a worker process died.
    """
    workers = [_process(share) if processes else _thread(share) for share in shares]
    pending: deque[Future[T]] = deque()
    try:
        with shielded() if processes else contextlib.nullcontext():  # the first job of a pool starts its process
            for pool, job in workers * AHEAD:
                pending.append(pool.submit(job))
        for pool, job in itertools.cycle(workers):
            item = pending.popleft().result()
            pending.append(pool.submit(job))
            yield item
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process of --dataloader_num_workers died; see its output above. It may have run out of "
            'memory, or the script has code outside of `if __name__ == "__main__":`, which every worker runs too'
        ) from error
    finally:
        for result in pending:  # cancel all before waiting for each
            result.cancel()
        for pool, _ in workers:
            pool.shutdown()  # once: after ``wait=False`` a pool of processes no longer knows what to wait for


def _thread(share: Iterable[T]) -> tuple[Executor, Callable[[], T]]:
    return ThreadPoolExecutor(1, "data"), iter(share).__next__


def _process(share: Iterable[T]) -> tuple[Executor, Callable[[], T]]:
    context = multiprocessing.get_context("spawn")  # a fork of a process in which JAX has threads may hang
    resource_tracker.ensure_running()  # otherwise it starts with the first worker, and unblocks the signals again
    return ProcessPoolExecutor(1, context, initializer=_begin, initargs=(share,)), _next


_items: Iterator = iter(())
"""In a worker process, the items of its share."""


def _begin(share: Iterable) -> None:
    """Set up a worker process: it leaves the devices to the training process, and ends with it."""
    global _items
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    util.Finalize(None, os._exit, args=(0,), exitpriority=0)  # the teardown of imported modules takes seconds
    _items = iter(share)


def _next() -> Any:
    return next(_items)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
