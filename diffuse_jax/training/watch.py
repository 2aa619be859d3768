"""Ending all processes of a run, with a line that says why, when one of them dies.

A process that waits for another in a collective would otherwise wait for ever, or until JAX ends it with a stack trace.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

BEAT = 3.0
"""Seconds between two signs of life of a process."""

SILENCE = 25.0
"""Seconds without a sign of life after which a process counts as dead."""

FALLBACK = round(2 * (SILENCE + 5 * BEAT))
"""The same for JAX's own service, in case that this module's thread hangs.

A process that dies may have last been heard of half of this before. The service ends the others with a stack trace and
without their last line, so even then it must come after this module, and after process 0 has left (:func:`_exit`).
"""

FOLDER = "diffuse_jax/alive"
RESTART = "start all again"


class Sign(NamedTuple):
    """What a process last said to the others.

    Attributes:
      host: the name of its machine.
      word: the number of its beat; "done" after the last, or "failed" and its error.
    """

    host: str
    word: str


class Watch:
    """What a process knows of the others; it has no clock of its own, and no connection.

    Args:
      me: the index of this process.
      count: the number of processes.
      now: the time in seconds.
    """

    def __init__(self, me: int, count: int, now: float) -> None:
        self.me, self.count = me, count
        self._seen: dict[int, tuple[Sign | None, float]] = {i: (None, now) for i in range(count) if i != me}

    def trouble(self, signs: Mapping[int, Sign], now: float) -> str | None:
        """Why this process cannot go on, given the signs that are there now; None if it can."""
        for other, (before, since) in self._seen.items():
            sign = signs.get(other)
            if sign != before:
                self._seen[other] = sign, now
            elif (sign is None or sign.word != "done") and now - since > SILENCE:
                return (
                    f"{self._named(other, sign)} has not been heard of for {SILENCE:.0f} s: it has died or is cut off"
                )
            if sign is not None and sign.word.startswith("failed"):
                return f"{self._named(other, sign)} {sign.word}"
        return None

    def _named(self, other: int, sign: Sign | None) -> str:
        return f"process {other} of {self.count}" + (f" on {sign.host}" if sign is not None else "")


_told: Callable[[str], None] | None = None
"""Tells the other processes a word; None without others."""

_holds_store = False
_failed = False


def watch_processes(end: Callable[[str], Any] | None = None, restart: str = RESTART) -> None:
    """Watch the other processes from a thread, and end this one when one of them dies or fails.

    Call it after ``jax.distributed.initialize``, on every process; the training scripts do. With one process it does
    nothing.

    Args:
      end: what to do with the message; by default it is printed, and the process exits with status 1.
      restart: what the message then tells the user to do.
    """
    global _told, _holds_store
    from jax._src import distributed  # the store of jax.distributed has no public name

    state, host = distributed.global_state, socket.gethostname()
    client, me, count = state.client, state.process_id, state.num_processes
    if _told is not None or client is None or count == 1:
        return

    def tell(word: str) -> None:
        client.key_value_set(f"{FOLDER}/{me}", f"{host} {word}", allow_overwrite=True)

    def signs() -> dict[int, Sign]:
        found = client.key_value_dir_get(FOLDER)
        return {int(key.rpartition("/")[2]): Sign(*value.split(" ", 1)) for key, value in found}

    def run() -> None:
        watch, beat, reached = Watch(me, count, time.monotonic()), 0, time.monotonic()
        while not stopped.wait(BEAT):
            beat += 1
            try:
                with last_word:
                    if stopped.is_set():
                        return
                    tell(str(beat))
                trouble, reached = watch.trouble(signs(), time.monotonic()), time.monotonic()
            except Exception as error:
                trouble = None
                if stopped.is_set() or time.monotonic() - reached > SILENCE / 2:
                    trouble = f"process 0 at {state.coordinator_address} cannot be reached ({error})"
            if trouble is not None and not stopped.is_set():
                end(trouble) if end else _end(f"{trouble}; this process ends too; {restart}")
                return

    stopped, last_word = threading.Event(), threading.Lock()

    def say_last(word: str) -> None:
        with last_word, contextlib.suppress(Exception):  # there may be nobody left to tell
            stopped.set()
            tell(word)

    _told, _holds_store = say_last, me == 0
    tell("0")
    threading.Thread(target=run, name="watch", daemon=True).start()


@contextlib.contextmanager
def outcome_told(*, stops_alone: bool = False) -> Iterator[None]:
    """Tell the other processes how the block ended: that this one needs them no longer, or that they wait in vain.

    Args:
      stops_alone: after SIGTERM the others wait in vain too; training agrees with them on the last step.
    """
    try:
        yield
    except SystemExit as ended:
        expected = (0, None) if stops_alone else (0, None, 128 + signal.SIGTERM)
        _tell("done" if ended.code in expected else "failed: it was stopped")
        raise
    except BaseException as error:
        text = str(error).strip() or type(error).__name__
        _tell(f"failed: {text.splitlines()[0][:300]}")
        raise
    _tell("done")


def leave(status: int) -> NoReturn:
    """End the process; after a failure without the barrier at which JAX waits for the others, as these end by
    themselves."""
    if status and _told is not None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        _exit(status)
    sys.exit(status)


def _exit(status: int) -> NoReturn:
    """End this process at once; process 0 last, because it holds what the others have yet to read."""
    if _holds_store:
        time.sleep(3 * BEAT)
    os._exit(status)


def failed() -> bool:
    """Whether this process is one of several and has reported its failure to the others."""
    return _failed


def _tell(word: str) -> None:
    global _failed
    if _told is not None:
        _failed = word.startswith("failed")
        _told(word)


def _end(message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{message}\n".encode())
    _exit(1)
