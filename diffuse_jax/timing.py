"""How long JAX has been compiling."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def compile_seconds() -> Iterator[Callable[[], float]]:
    """Within the block, what it yields tells how many seconds JAX has spent tracing, lowering and compiling.

    JAX reports nested traces each for itself, so the intervals are united, not added up.
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
