"""Bounds for tests that open hostile files: how long an opening may take, and how much memory it may ask for."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """The most address space that this process has had, in bytes; 0 where the system does not say."""
    found = re.search(r"VmPeak:\s*(\d+) kB", STATUS.read_text()) if STATUS.is_file() else None
    return 1024 * int(found[1]) if found else 0


@contextmanager
def bounded(seconds: float = 60.0, memory: int = 1 << 30) -> Iterator[None]:
    """Fail if the block takes longer (it is interrupted), or asks for more memory whether it uses it or not."""

    def stop(*_: object) -> None:
        raise AssertionError(f"took longer than {seconds} s")

    main = threading.current_thread() is threading.main_thread()
    before, old = peak_memory(), signal.signal(signal.SIGALRM, stop) if main else None
    if main:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
    grown = peak_memory() - before
    assert grown <= memory, f"asked for {grown >> 20} MiB"
