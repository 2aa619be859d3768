"""Ending a run cleanly when the machine is preempted (SIGTERM, SIGHUP) or the user presses Ctrl-C (SIGINT).

Python runs a signal handler between two instructions of the main thread, so not while XLA compiles or while the program
waits for a step. A separate thread therefore reports at once that the signal has arrived and what will happen; it also
ends a process that has nothing to save and does not return to Python. This module does not import JAX, so that a script
can handle signals before JAX is loaded.
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
"""Seconds within which a process with nothing left to save must end by itself."""

SAME = 1.0
"""Seconds within which a second Ctrl-C counts as the first: launchers forward what the terminal has already sent."""


class Interrupted(SystemExit):
    """A signal ended the run; the exit status is 128 plus the number of the signal, so 143 after SIGTERM."""


class Phase(NamedTuple):
    """What a signal does during one phase of a run.

    Attributes:
      then: the message to the user.
      at_once: whether the handler raises :class:`Interrupted` wherever the program is; otherwise it only records the
        signal.
      nothing_to_save: whether the process may be ended from outside the main thread.
    """

    then: str
    at_once: bool
    nothing_to_save: bool = False


class Interruption:
    """Whether the run has been asked to end, and what a signal does in the current phase.

    Several processes must stop after the same step: JAX's preemption service, which listens for SIGTERM on every
    process, determines that step.

    Attributes:
      signal: the first signal received; None if there was none.
      agreed: whether all processes of the run have agreed to stop after this step.
    """

    def __init__(self, phase: Phase, owner: bool) -> None:
        self.signal: int | None = None
        self.agreed = False
        self._phase, self._owner = phase, owner
        self._signal_phase: Phase | None = None  # when the handler saw the first signal; the thread may read it later
        self._presses = (_Presses(), _Presses())  # as seen by the handler, and by the thread
        self._lost = False  # the exception was raised where Python ignores it
        self.reported = threading.Event()  # the thread has printed what the first signal does
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)

    def __call__(self, step: int) -> bool:
        """Whether to stop after ``step``; all processes must call this after every step."""
        import jax
        from jax.experimental import multihost_utils

        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = self.signal or signal.SIGTERM
            self.agreed = True
            return True
        return jax.process_count() == 1 and self.signal is not None

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Set the phase for the block. A signal received earlier ends the run here if it would within the block."""
        before, self._phase = self._phase, phase
        try:
            if phase.at_once and self.signal is not None:
                raise self.ended()
            yield
        finally:
            self._phase = before

    def rest(self, phase: Phase) -> None:
        """Set the phase from now on, except in blocks with a phase of their own."""
        self._phase = phase

    def at_once(self) -> contextlib.AbstractContextManager[None]:
        """Let a signal end the block wherever it is, because it leaves nothing half done."""
        return self.phase(self._phase._replace(at_once=True))

    def ended(self) -> Interrupted:
        """The exception to raise because of the signal."""
        return Interrupted(128 + (self.signal or signal.SIGTERM))

    def end(self, message: str) -> Interrupted:
        """The exception to raise once everything is saved, after printing ``message``."""
        _tell(f"{signal.Signals(self.signal or signal.SIGTERM).name}: {message}")
        with contextlib.suppress(OSError):
            os.write(self._write, b"\0")  # from now on the process has GRACE seconds
        return self.ended()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """The handler, in the main thread."""
        first = self.signal is None or self._lost
        self.signal, self._lost = self.signal or number, False
        self._signal_phase = self._signal_phase or self._phase
        if first and self._phase.at_once:
            raise self.ended()
        if self._presses[0].again(number) and not self._owner:
            raise KeyboardInterrupt

    def ignored(self, unraisable: Any, otherwise: Callable[[Any], None]) -> None:
        """``sys.unraisablehook``: exceptions in ``__del__`` and during garbage collection are lost; raise ours
        again."""
        if not isinstance(unraisable.exc_value, Interrupted):
            otherwise(unraisable)
            return
        self._lost = True
        again = threading.Timer(0.02, _thread.interrupt_main, (self.signal,))
        again.daemon = True
        again.start()

    def _watch(self) -> None:
        """The thread: each byte from the pipe is the number of a signal; 0 means that everything is saved."""
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
                    self.reported.set()
                if self._owner and (number == 0 or (self._signal_phase or self._phase).nothing_to_save):
                    wait = GRACE

    def _answer(self, number: int, seen: int) -> None:
        """Report what a signal does; the second Ctrl-C ends the process here."""
        if number == 0:
            return
        name = signal.Signals(number).name
        if self._presses[1].again(number):
            _tell(f"{name} again: stopped at once; what was not yet saved is lost")
            if self._owner:
                os._exit(128 + number)
        elif not seen:
            _tell(f"{name} received: {(self._signal_phase or self._phase).then}")
        elif number == signal.SIGINT and seen != number:
            _tell(f"{name} received: the run is already ending; once more stops it at once")


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

BEFORE = Phase("the run ends; no step was finished, so there is nothing to save", at_once=True, nothing_to_save=True)
"""The phase in which a run is being loaded."""

_listening: Interruption | None = None


class _Presses:
    """Distinguishes a second Ctrl-C from one that was delivered twice."""

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
    """Write a line to stderr from any thread, below a progress bar, bypassing Python's buffers, which may be in use."""
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())


@contextmanager
def interruptions(phase: Phase = BEFORE, owner: bool = False) -> Iterator[Interruption]:
    """Handle signals while the block runs; nested blocks share the outermost :class:`Interruption`.

    A second Ctrl-C ends the run at once, without a checkpoint.

    Args:
      phase: the initial phase.
      owner: whether the process exists only for this run, so that it may be ended.
    """
    global _listening
    if _listening is not None and threading.current_thread() is threading.main_thread():
        yield _listening
        return
    interruption = Interruption(phase, owner)
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # only the main thread can handle signals
        return
    # An ignored SIGHUP, as under nohup, stays ignored; SIGTERM is handled by JAX if it has joined several processes.
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
        if owner and interruption.signal is not None:  # keep listening until the process ends: its threads may hang
            interruption.reported.wait(SAME)
        else:
            sys.unraisablehook = hook
            _stop(interruption, thread, woken, before)


def _stop(interruption: Interruption, thread: threading.Thread, woken: int, before: Mapping[int, Any]) -> None:
    """Restore the handlers that :func:`interruptions` replaced."""
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
    """Block the signals for processes started in the block; terminals and cluster managers send them to the whole
    group.

    Child processes inherit the mask. In this process the signals are only delayed until the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
