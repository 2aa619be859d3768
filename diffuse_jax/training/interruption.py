"""Ending a run in good order when the machine is taken away (SIGTERM, SIGHUP) or somebody presses Ctrl-C (SIGINT).

Python runs a signal's handler between two instructions of the main thread, so not while XLA compiles or while a step is
waited for. A thread therefore says at once that the signal has arrived and what follows; it also ends a process that
has nothing to save and does not come back to Python. This module imports no JAX: a script listens before it loads that.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

GRACE = 10.0
"""Seconds in which a process that has nothing left to save must have ended by itself."""

SAME = 1.0
"""Seconds in which a second Ctrl-C counts as the first: launchers pass on what the terminal sent already."""


class Interrupted(SystemExit):
    """The run was asked to end and did; the process exits with 128 and the signal's number, so 143 after SIGTERM."""


class Phase(NamedTuple):
    """What a signal does at some time of a run.

    Attributes:
      then: what the user is told.
      at_once: the handler raises :class:`Interrupted` wherever the program is; else the signal is only noted.
      nothing_to_save: so that the process may be ended from outside of the main thread.
    """

    then: str
    at_once: bool
    nothing_to_save: bool = False


class Interruption:
    """Whether the run was asked to end, and what that does at the moment.

    Several processes must stop after the same step: JAX's preemption service, which listens to SIGTERM on every
    process, tells them all which step that is.

    Attributes:
      signal: the first signal that came; None if none did.
      agreed: whether all processes of the run stop after this step.
    """

    def __init__(self, phase: Phase, owner: bool) -> None:
        self.signal: int | None = None
        self.agreed = False
        self._phase, self._owner = phase, owner
        self._came: Phase | None = None  # when the handler saw the first signal; the thread may read of it later
        self._presses = (_Presses(), _Presses())  # as the handler sees them, and as the thread does
        self._lost = False  # the exception was raised where Python ignores it
        self.told = threading.Event()  # the thread has said what the first signal does
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)

    def __call__(self, step: int) -> bool:
        """Whether to stop after ``step``; to be asked after every step, by all processes."""
        import jax
        from jax.experimental import multihost_utils

        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = self.signal or signal.SIGTERM
            self.agreed = True
            return True
        return jax.process_count() == 1 and self.signal is not None

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """While the block runs, a signal does this; one that came before ends the run here if it would within."""
        before, self._phase = self._phase, phase
        try:
            if phase.at_once and self.signal is not None:
                raise self.ended()
            yield
        finally:
            self._phase = before

    def rest(self, phase: Phase) -> None:
        """From now on a signal does this, except in blocks of other phases."""
        self._phase = phase

    def at_once(self) -> contextlib.AbstractContextManager[None]:
        """While the block runs, nothing is half done: a signal ends it wherever it is."""
        return self.phase(self._phase._replace(at_once=True))

    def ended(self) -> Interrupted:
        """What is raised because of the signal."""
        return Interrupted(128 + (self.signal or signal.SIGTERM))

    def end(self, message: str) -> Interrupted:
        """The exception to raise when everything is saved, after saying so."""
        _tell(f"{signal.Signals(self.signal or signal.SIGTERM).name}: {message}")
        with contextlib.suppress(OSError):
            os.write(self._write, b"\0")  # from now on the process has GRACE seconds
        return self.ended()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """The handler, in the main thread."""
        first = self.signal is None or self._lost
        self.signal, self._lost = self.signal or number, False
        self._came = self._came or self._phase
        if first and self._phase.at_once:
            raise self.ended()
        if self._presses[0].again(number) and not self._owner:
            raise KeyboardInterrupt

    def ignored(self, unraisable: Any, otherwise: Callable[[Any], None]) -> None:
        """``sys.unraisablehook``: what is raised in ``__del__`` and in garbage collection is lost; raise ours again."""
        if not isinstance(unraisable.exc_value, Interrupted):
            otherwise(unraisable)
            return
        self._lost = True
        again = threading.Timer(0.02, _thread.interrupt_main, (self.signal,))
        again.daemon = True
        again.start()

    def _watch(self) -> None:
        """The thread: one byte of the pipe is one signal (of any number), 0 means that everything is saved."""
        wait: float | None = None
        seen = 0
        while True:
            if not select.select([self._read], [], [], wait)[0]:
                _tell("the process did not end by itself; stopped")
                os._exit(128 + (seen or signal.SIGTERM))
            numbers = os.read(self._read, 64)
            if not numbers:
                return
            for number in numbers:
                if number and number not in SIGNALS:
                    continue
                self._answer(number, seen)
                seen = seen or number
                if seen:
                    self.told.set()
                if self._owner and (number == 0 or (self._came or self._phase).nothing_to_save):
                    wait = GRACE

    def _answer(self, number: int, seen: int) -> None:
        """Say what a signal does; the second Ctrl-C does it here."""
        if number == 0:
            return
        name = signal.Signals(number).name
        if self._presses[1].again(number):
            _tell(f"{name} again: stopped at once; what was not yet saved is lost")
            if self._owner:
                os._exit(128 + number)
        elif not seen:
            _tell(f"{name} received: {(self._came or self._phase).then}")
        elif number == signal.SIGINT and seen != number:
            _tell(f"{name} received: the run is ending already; once more stops it at once")


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

BEFORE = Phase("the run ends; no step was finished, so there is nothing to save", at_once=True, nothing_to_save=True)
"""While a run is loaded."""

_listening: Interruption | None = None


class _Presses:
    """Tells a second Ctrl-C from one that was only delivered twice."""

    def __init__(self) -> None:
        self._first: float | None = None

    def again(self, number: int) -> bool:
        if number != signal.SIGINT:
            return False
        now = time.monotonic()
        if self._first is None:
            self._first = now
        return now - self._first > SAME


def _tell(text: str) -> None:
    """A line on stderr from any thread, past Python's own buffers, which may be in use; below a progress bar."""
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())


@contextmanager
def interruptions(phase: Phase = BEFORE, owner: bool = False) -> Iterator[Interruption]:
    """Listen while the block runs; within another such block, that one's.

    A second Ctrl-C ends the run at once, without a checkpoint.

    Args:
      phase: what a signal does at first.
      owner: whether the process is there for the run alone, so that it may be ended.
    """
    global _listening
    if _listening is not None and threading.current_thread() is threading.main_thread():
        yield _listening
        return
    interruption = Interruption(phase, owner)
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # only the main thread can listen
        return
    # SIGHUP that is ignored, as under nohup, stays so; SIGTERM is JAX's where it has joined several processes.
    jax = sys.modules.get("jax")
    theirs = {signal.SIGTERM} if jax is not None and jax.distributed.is_initialized() else set()
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        theirs.add(signal.SIGHUP)
    wanted = [number for number in SIGNALS if number not in theirs]
    woken = signal.set_wakeup_fd(interruption._write, warn_on_full_buffer=False)
    before: dict[int, Any] = {number: signal.signal(number, interruption._handle) for number in wanted}
    hook = sys.unraisablehook
    sys.unraisablehook = lambda lost: interruption.ignored(lost, hook)
    thread = threading.Thread(target=interruption._watch, name="signals", daemon=True)
    thread.start()
    _listening = interruption
    try:
        yield interruption
    finally:
        if owner and interruption.signal is not None:  # listen until the process is gone: its threads may not end
            interruption.told.wait(SAME)
        else:
            sys.unraisablehook = hook
            _stop(interruption, thread, woken, before)


def _stop(interruption: Interruption, thread: threading.Thread, woken: int, before: Mapping[int, Any]) -> None:
    """Put back what :func:`interruptions` found."""
    global _listening
    _listening = None
    signal.set_wakeup_fd(woken)
    for number, handler in before.items():
        signal.signal(number, handler)
    os.close(interruption._write)
    thread.join()
    os.close(interruption._read)


@contextmanager
def shielded() -> Iterator[None]:
    """Processes that are started inside never see the signals, which terminals and cluster managers send to all.

    The mask is inherited. Here they are only late.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
