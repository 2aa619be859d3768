"""Ending a run in good order when the machine is taken away (SIGTERM) or somebody presses Ctrl-C (SIGINT)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interrupted(SystemExit):
    """The run was asked to end and has saved a checkpoint; ends the process with code 143 (SIGTERM) or 130 (SIGINT)."""


class Interruption:
    """Whether the run was asked to end.

    One process listens to SIGTERM and SIGINT. Several must stop after the same step: JAX's preemption service, which
    listens to SIGTERM on every process, tells them all which step that is.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, step: int) -> bool:
        """Whether to stop after ``step``; to be asked after every step, by all processes."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = self.signal or signal.SIGTERM
            return True
        return jax.process_count() == 1 and self.signal is not None

    def end(self, message: str) -> Interrupted:
        """The exception to raise when everything is saved; its code is 128 and the number of the signal."""
        number = signal.Signals(self.signal or signal.SIGTERM)
        print(f"{number.name}: {message}", flush=True)
        return Interrupted(128 + number)


@contextmanager
def interruptions() -> Iterator[Interruption]:
    """Listen while the block runs. A second SIGINT ends the run at once, without a checkpoint."""
    interruption = Interruption()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and interruption.signal == signal.SIGINT:
            raise KeyboardInterrupt
        interruption.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
