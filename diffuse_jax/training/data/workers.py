"""Batches made ahead of the step, by threads or by worker processes that take turns.

Results come in the order of the turns, so what a run sees does not depend on who is faster. (The worker processes of
grain were tried: they leave shared memory behind where a run ends without closing them, and need ``/dev/shm`` for all
batches made ahead, which containers keep small.)
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
"""Results that each worker makes ahead."""


def in_turns(shares: Sequence[Iterable[T]], processes: bool) -> Generator[T, None, None]:
    """The first item of every share, then the second of every share, and so on; shares do not end.

    Closing the iterator ends the workers. So does the end of the program, and its death. Signals to the whole group of
    processes, such as Ctrl-C, are for the program alone: it decides when it needs no more items.

    Args:
      shares: what each worker iterates over; they must pickle if the workers are processes.
      processes: whether the workers are processes, or threads of this one.

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
            "a worker process of --dataloader_num_workers died; what it said stands above. It may have run out of "
            'memory, or the script has code outside of `if __name__ == "__main__":`, which every worker runs too'
        ) from error
    finally:
        for result in pending:  # tell all before waiting for each
            result.cancel()
        for pool, _ in workers:
            pool.shutdown()  # once: after ``wait=False`` a pool of processes no longer knows what to wait for


def _thread(share: Iterable[T]) -> tuple[Executor, Callable[[], T]]:
    return ThreadPoolExecutor(1, "data"), iter(share).__next__


def _process(share: Iterable[T]) -> tuple[Executor, Callable[[], T]]:
    context = multiprocessing.get_context("spawn")  # a fork of a process in which JAX has threads may hang
    resource_tracker.ensure_running()  # would else be started with the first worker, and let signals through again
    return ProcessPoolExecutor(1, context, initializer=_begin, initargs=(share,)), _next


_items: Iterator = iter(())
"""In a worker process: its share."""


def _begin(share: Iterable) -> None:
    """In a worker process: the devices belong to the process that trains, and without it there is nothing to do."""
    global _items
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    util.Finalize(None, os._exit, args=(0,), exitpriority=0)  # what was imported takes seconds to take itself apart
    _items = iter(share)


def _next() -> Any:
    return next(_items)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
