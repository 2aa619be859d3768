"""What a run says about itself: a progress bar, records for the trackers, and an error when a step goes wrong."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from diffuse_jax.training.state import Metrics
from diffuse_jax.training.trackers import Pictures, Tracker

AHEAD = 4
"""Steps that may wait on the device. More would not make it busier, and each keeps its batch in memory."""

NAMES_SHOWN = 16


class Work(NamedTuple):
    """What one update is, for speeds.

    Attributes:
      images: pictures, over all devices.
      devices: that share them.
      flops: operations of the model; None where the utilisation is not wanted.
      peak: operations per second that one device could do.
    """

    images: int
    devices: int
    flops: float | None = None
    peak: float | None = None


class Monitor:
    """Collects the metrics of steps on the device and fetches them when a record is written.

    Args:
      trackers: where records go; empty on processes other than the first.
      first: updates made before this run.
      total: updates made in the end.
      work: of one update.
      more: ``update -> other numbers`` of a record, such as the learning rate.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        first: int,
        total: int,
        work: Work,
        more: Callable[[int], dict[str, float]],
    ) -> None:
        self.trackers, self.work, self.more = trackers, work, more
        self._pending: list[tuple[int, Metrics, Sequence[str]]] = []
        self._flying: deque[Metrics] = deque()
        self._clock: float | None = None  # starts when the first step, which is compiled, is done
        self._timed = 0
        quiet = jax.process_index() != 0
        self._bar = tqdm(
            total=total, initial=first, mininterval=5, file=sys.stderr, unit="step", disable=quiet, dynamic_ncols=True
        )

    def add(self, step: int, metrics: Metrics, names: Sequence[str]) -> None:
        """Note the metrics of a step; waits only where the device is :data:`AHEAD` steps behind.

        Args:
          step: updates made with this one.
          metrics: scalars on the device.
          names: what the batch was made of.
        """
        self._pending.append((step, metrics, tuple(names)))
        self._flying.append(metrics)
        self._bar.update()
        if self._clock is None:
            jax.block_until_ready(metrics)
            self._clock = time.perf_counter()
        else:
            self._timed += 1
        if len(self._flying) > AHEAD:
            jax.block_until_ready(self._flying.popleft())

    def flush(self) -> dict[str, float]:
        """Write a record of the steps since the last one: means of their metrics, and speed.

        Raises:
          FloatingPointError: loss or gradient of one of them is not finite; the text names the step and its batch.
        """
        if not self._pending:
            return {}
        values = jax.device_get([metrics for _, metrics, _ in self._pending])
        for (step, _, names), metrics in zip(self._pending, values, strict=True):
            _check(step, metrics, names)
        last = self._pending[-1][0]
        shared = set.intersection(*(set(m) for m in values))
        record = {name: float(np.mean([m[name] for m in values])) for name in values[-1] if name in shared}
        record |= self.more(last) | self._speed()
        for tracker in self.trackers:
            tracker.numbers(last, record)
        self._bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
        self._pending, self._timed, self._clock = [], 0, time.perf_counter()
        self._flying.clear()
        return record

    def _speed(self) -> dict[str, float]:
        """Of the steps since the last record; nothing where the only one is the first, which was compiled."""
        if self._clock is None or not self._timed:
            return {}
        steps = self._timed / (time.perf_counter() - self._clock)
        speed = {
            "steps_per_second": steps,
            "images_per_second_per_device": steps * self.work.images / self.work.devices,
        }
        if self.work.flops is not None and self.work.peak is not None:
            speed["model_flops_utilisation"] = steps * self.work.flops / (self.work.peak * self.work.devices)
        return speed

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Work inside, such as a checkpoint or validation pictures, does not count as time of the steps."""
        if self._pending:
            jax.block_until_ready(self._pending[-1][1])
        start = time.perf_counter()
        yield
        if self._clock is not None:
            self._clock += time.perf_counter() - start

    def pictures(self, step: int, pictures: Pictures) -> None:
        """Hand validation pictures to the trackers."""
        for tracker in self.trackers:
            tracker.pictures(step, pictures)

    def close(self) -> None:
        self._bar.close()
        for tracker in self.trackers:
            tracker.close()


def _check(step: int, metrics: dict[str, np.ndarray], names: Sequence[str]) -> None:
    wrong = [name for name in ("loss", "grad_norm") if name in metrics and not np.isfinite(metrics[name])]
    if wrong:
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        batch = ", ".join(map(str, names[:NAMES_SHOWN])) + more if names else "(its data has no names)"
        values = " and ".join(f"{name} is {metrics[name]}" for name in wrong)
        raise FloatingPointError(
            f"{values} at step {step}. Its batch: {batch}. Nothing of this or later steps was saved; try a lower "
            "--learning_rate, --mixed_precision no, or training without these pictures"
        )
