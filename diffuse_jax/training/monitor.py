"""Monitoring of a run: a progress bar, records for the trackers, and an error if a step is not finite."""

from __future__ import annotations

import datetime
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from diffuse_jax.training.distributed import say
from diffuse_jax.training.state import Metrics
from diffuse_jax.training.trackers import Images, Tracker

AHEAD = 4
"""Maximum number of steps queued on the device. More would not keep it busier, and each holds its batch in memory."""

NAMES_SHOWN = 16


class Work(NamedTuple):
    """The work of one training step, for measuring speed.

    Attributes:
      images: number of images, over all devices.
      devices: number of devices that share them.
      flops: floating-point operations of the model; None if the utilisation is not measured.
      peak: peak speed of one device in operations per second.
      examples: number of examples in an epoch; None if unknown.
    """

    images: int
    devices: int
    flops: float | None = None
    peak: float | None = None
    examples: int | None = None


class Monitor:
    """Collects the metrics of steps on the device and fetches them when a record is written.

    Args:
      trackers: where records are written; empty on all processes but the first.
      first: number of training steps completed before this run.
      total: total number of training steps.
      work: the work of one training step.
      more: maps a step to further values of its record, such as the learning rate.
      compiling: returns the seconds spent on compilation so far, which do not count as time of the steps.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        first: int,
        total: int,
        work: Work,
        more: Callable[[int], dict[str, float]],
        compiling: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.trackers, self.work, self.more, self.total = trackers, work, more, total
        self._compiling, self._compiled = compiling, 0.0
        self._began = time.perf_counter()
        self._failed: set[Tracker] = set()
        self._pending: list[tuple[int, Metrics, Sequence[str]]] = []
        self._flying: deque[Metrics] = deque()
        self._clock: float | None = None  # starts when the first step, which is compiled, is done
        self._timed = 0
        # Without a terminal, as in the log of a cluster, each record is printed as a line instead.
        self._lines = not sys.stderr.isatty()
        quiet = self._lines or jax.process_index() != 0
        self._bar = tqdm(
            total=total, initial=first, mininterval=5, file=sys.stderr, unit="step", disable=quiet, dynamic_ncols=True
        )

    def add(self, step: int, metrics: Metrics, names: Sequence[str]) -> None:
        """Record the metrics of a step; waits only if the device is :data:`AHEAD` steps behind.

        Args:
          step: number of completed training steps, including this one.
          metrics: scalars on the device.
          names: names of the examples in the batch.
        """
        self._pending.append((step, metrics, tuple(names)))
        self._flying.append(metrics)
        self._bar.update()
        if self._clock is None:
            jax.block_until_ready(metrics)
            self._start_clock()
            self._bar.unpause()  # the remaining time is estimated without the first step
        else:
            self._timed += 1
        if len(self._flying) > AHEAD:
            jax.block_until_ready(self._flying.popleft())

    def flush(self) -> dict[str, float]:
        """Write a record of the steps since the last record: means of their metrics, and speed.

        Raises:
          FloatingPointError: the loss or gradient of a step is not finite; the message names the step and its batch.
        """
        if not self._pending:
            return {}
        values = jax.device_get([metrics for _, metrics, _ in self._pending])
        for (step, _, names), metrics in zip(self._pending, values, strict=True):
            _check(step, metrics, names)
        last = self._pending[-1][0]
        shared = set.intersection(*(set(m) for m in values))
        record = {name: float(np.mean([m[name] for m in values])) for name in values[-1] if name in shared}
        record |= self.more(last) | self._speed() | self._place(last)
        self._for_trackers(lambda tracker: tracker.scalars(last, record))
        self._bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
        if self._lines:
            say(line_of(last, self.total, record))
        self._pending, self._timed = [], 0
        self._start_clock()
        self._flying.clear()
        return record

    def _start_clock(self) -> None:
        self._clock, self._compiled = time.perf_counter(), self._compiling()

    def _place(self, step: int) -> dict[str, float]:
        """The progress of the run: seconds since training began, and epochs if their length is known."""
        place = {"elapsed_seconds": time.perf_counter() - self._began}
        return place if self.work.examples is None else place | {"epoch": step * self.work.images / self.work.examples}

    def _for_trackers(self, write: Callable[[Tracker], None]) -> None:
        """Call ``write`` for every tracker. A log that cannot be written does not end training; it is reported once."""
        for tracker in self.trackers:
            try:
                write(tracker)
            except Exception as error:
                if tracker not in self._failed:
                    say(f"warning: {type(tracker).__name__} failed ({error!r}); training continues without it")
                self._failed.add(tracker)

    def _speed(self) -> dict[str, float]:
        """The speed since the last record; empty if the only step was the first one, which was compiled."""
        if self._clock is None or not self._timed:
            return {}
        steps = self._timed / (time.perf_counter() - self._clock - (self._compiling() - self._compiled))
        speed = {
            "steps_per_second": steps,
            "images_per_second_per_device": steps * self.work.images / self.work.devices,
        }
        if self.work.flops is not None and self.work.peak is not None:
            speed["model_flops_utilisation"] = steps * self.work.flops / (self.work.peak * self.work.devices)
        return speed

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Exclude the block, such as writing a checkpoint or validation images, from the time of the steps."""
        if self._pending:
            jax.block_until_ready(self._pending[-1][1])
        start, compiled = time.perf_counter(), self._compiling()
        yield
        if self._clock is not None:
            self._clock += time.perf_counter() - start
            self._compiled += self._compiling() - compiled  # already included in the seconds above
        self._bar.unpause()

    def images(self, step: int, images: Images) -> None:
        """Pass validation images to the trackers."""
        self._for_trackers(lambda tracker: tracker.images(step, images))

    def close(self) -> None:
        self._bar.close()
        self._for_trackers(lambda tracker: tracker.close())


def line_of(step: int, total: int, record: Mapping[str, float]) -> str:
    """A record as a line of text with the time of day, for the user."""
    epoch = f", epoch {record['epoch']:.2f}" if "epoch" in record else ""
    speed = f", {record['steps_per_second']:.3g} steps/s" if "steps_per_second" in record else ""
    now = datetime.datetime.now().isoformat(" ", "seconds")
    return f"{now} step {step} of {total}{epoch}: loss {record['loss']:.4f}{speed}"


def _check(step: int, metrics: dict[str, np.ndarray], names: Sequence[str]) -> None:
    wrong = [name for name in ("loss", "grad_norm") if name in metrics and not np.isfinite(metrics[name])]
    if wrong:
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        batch = ", ".join(map(str, names[:NAMES_SHOWN])) + more if names else "(its data has no names)"
        values = " and ".join(f"{name} is {metrics[name]}" for name in wrong)
        raise FloatingPointError(
            f"{values} at step {step}. Its batch: {batch}. Nothing of this or later steps was saved; try a lower "
            "--learning_rate, --mixed_precision no, or training without these images"
        )
