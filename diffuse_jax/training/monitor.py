"""What a run says about itself: a progress bar, records for the trackers, and an error when a step goes wrong."""

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
from diffuse_jax.training.trackers import Pictures, Tracker

AHEAD = 4
"""Steps that may wait on the device. More would not make it busier, and each keeps its batch in memory."""

NAMES_SHOWN = 16


class Work(NamedTuple):
    """What one update is, for speeds.

    Attributes:
      images: images, over all devices.
      devices: that share them.
      flops: operations of the model; None where the utilisation is not wanted.
      peak: operations per second that one device could do.
      examples: examples in an epoch; None where that is not known.
    """

    images: int
    devices: int
    flops: float | None = None
    peak: float | None = None
    examples: int | None = None


class Monitor:
    """Collects the metrics of steps on the device and fetches them when a record is written.

    Args:
      trackers: where records go; empty on processes other than the first.
      first: updates made before this run.
      total: updates made in the end.
      work: of one update.
      more: ``update -> other numbers`` of a record, such as the learning rate.
      compiling: seconds that were spent on compiling so far, which do not count as time of the steps.
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
        # Where nobody watches, as in the log of a cluster, each record is a line instead.
        self._lines = not sys.stderr.isatty()
        quiet = self._lines or jax.process_index() != 0
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
            self._start_clock()
            self._bar.unpause()  # its time to the end is that of the steps to come
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
        record |= self.more(last) | self._speed() | self._place(last)
        self._tell(lambda tracker: tracker.numbers(last, record))
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
        """Where the run is: seconds since it began to train, and epochs where their length is known."""
        place = {"elapsed_seconds": time.perf_counter() - self._began}
        return place if self.work.examples is None else place | {"epoch": step * self.work.images / self.work.examples}

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        """Hand something to every tracker. A log that cannot be written ends no training; it is said once."""
        for tracker in self.trackers:
            try:
                what(tracker)
            except Exception as error:
                if tracker not in self._failed:
                    say(f"warning: {type(tracker).__name__} cannot be written ({error!r}); training goes on without it")
                self._failed.add(tracker)

    def _speed(self) -> dict[str, float]:
        """Of the steps since the last record; nothing where the only one is the first, which was compiled."""
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
        """Work inside, such as a checkpoint or validation images, does not count as time of the steps."""
        if self._pending:
            jax.block_until_ready(self._pending[-1][1])
        start, compiled = time.perf_counter(), self._compiling()
        yield
        if self._clock is not None:
            self._clock += time.perf_counter() - start
            self._compiled += self._compiling() - compiled  # it is in the seconds above
        self._bar.unpause()

    def pictures(self, step: int, pictures: Pictures) -> None:
        """Hand validation images to the trackers."""
        self._tell(lambda tracker: tracker.pictures(step, pictures))

    def close(self) -> None:
        self._bar.close()
        self._tell(lambda tracker: tracker.close())


def line_of(step: int, total: int, record: Mapping[str, float]) -> str:
    """A record as a line for the person who reads along, with the time of day."""
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
