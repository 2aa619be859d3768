"""Measuring JAX's compile time, and durations as text."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def compile_seconds() -> Iterator[Callable[[], float]]:
    """A context that yields a function: the seconds that JAX has spent tracing, lowering and compiling within it.

    JAX reports nested traces separately, so the result is the union of the intervals, not their sum.
    """
    import jax.monitoring

    intervals: list[tuple[float, float]] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            intervals.append((now - duration_secs, now))

    def total() -> float:
        seconds, reached = 0.0, 0.0
        for start, end in sorted(intervals):
            seconds += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield total
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def spoken(seconds: float) -> str:
    """A duration in its two largest units: ``4 h 29 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{n} {unit}" for n, unit in ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")) if n]
    return " ".join(parts[:2]) or "0 s"
