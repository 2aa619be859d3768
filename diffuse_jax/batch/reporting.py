"""What a job says: how far it is, which images failed, and warnings that would repeat a hundred thousand times."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from diffuse_jax.timing import spoken

SHOWN = 20
"""How many failures are kept in memory; all of them are in a file."""

GIVE_UP = 100
"""After so many images in a row could not be written, no more are made."""

SPAN = 60.0
"""Seconds over which the speed is measured."""


class Status(NamedTuple):
    """How far a job is.

    Attributes:
      done: images that are there, those of earlier runs among them.
      total: images that the prompts ask for.
      failed: rows and images that failed.
      per_second: images per second over the last minute; 0 before the first is done.
      seconds_left: seconds until the end at this speed; None before the first is done.
    """

    done: int
    total: int
    failed: int
    per_second: float
    seconds_left: float | None

    def __str__(self) -> str:
        share = f"{self.done:,}/{self.total:,} images ({100 * self.done / max(1, self.total):.1f} %)"
        failed = f", {self.failed:,} failed" if self.failed else ""
        if self.seconds_left is None:
            return share + failed
        speed = f"{self.per_second:.2f}" if self.per_second < 10 else f"{self.per_second:,.0f}"
        return f"{share}{failed}, {speed} images/s, {spoken(self.seconds_left)} left"


class Failure(NamedTuple):
    """A row or an image that could not be made.

    Attributes:
      line: the number of the row.
      seed: the seed of the image; None if it is the row.
      error: why.
    """

    line: int
    seed: int | None
    error: str

    def __str__(self) -> str:
        return f"row {self.line}{'' if self.seed is None else f', seed {self.seed}'}: {self.error}"


class Failures:
    """The failures of a run, all of them in a file that exists only if there are any.

    Attributes:
      count: how many there are.
      first: the first of them.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.first: list[Failure] = []
        self._file: Any = None
        self._mutex, self._in_a_row = threading.Lock(), 0
        path.unlink(missing_ok=True)

    def add(self, failure: Failure) -> None:
        """Note a failure."""
        with self._mutex:
            self.count += 1
            if len(self.first) < SHOWN:
                self.first.append(failure)
            with contextlib.suppress(OSError):  # perhaps the same full disk
                self._file = self._file or self.path.open("w", encoding="utf-8", errors="backslashreplace")
                self._file.write(json.dumps(failure._asdict(), ensure_ascii=False) + "\n")
                self._file.flush()

    def written(self, ok: bool) -> None:
        """Note whether the last image could be written."""
        self._in_a_row = 0 if ok else self._in_a_row + 1

    def check(self) -> None:
        """Raise if it makes no sense to go on.

        Raises:
          RuntimeError: many images in a row could not be written.
        """
        if self._in_a_row >= GIVE_UP:
            why = self.first[-1].error if self.first else ""
            raise RuntimeError(f"{GIVE_UP} images in a row could not be written, the job stops ({why})")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


class Progress:
    """Counts images and reports now and then."""

    def __init__(self, total: int, done: int, failures: Failures, report: Callable[[Status], None] | None) -> None:
        self.total, self.done, self.made = total, done, 0
        self._failures, self._report, self._mutex = failures, report, threading.Lock()
        self._marks: deque[tuple[float, int]] = deque()

    def count(self) -> None:
        """One more image is done."""
        with self._mutex:
            self.done, self.made = self.done + 1, self.made + 1
            now = time.perf_counter()
            if not self._marks or now - self._marks[-1][0] >= SPAN / 60:
                self._marks.append((now, self.made))
                while now - self._marks[0][0] > SPAN and len(self._marks) > 2:
                    self._marks.popleft()
                if self._report is not None:
                    self._report(self.status())

    def status(self) -> Status:
        """How far it is."""
        speed = 0.0
        if len(self._marks) > 1:
            (since, before), (now, made) = self._marks[0], self._marks[-1]
            speed = (made - before) / max(now - since, 1e-9)
        left = (self.total - self.done) / speed if speed else None
        return Status(self.done, self.total, self._failures.count, speed, left)


@contextlib.contextmanager
def few_warnings(most: int = 3) -> Iterator[None]:
    """Show the first warnings of each kind, and at the end how many more there were.

    Two warnings are of one kind if they differ in numbers and quotations alone. Python's own memory of the warnings
    that it has shown, which would grow with every prompt, is not used.
    """
    counts: Counter[str] = Counter()
    with warnings.catch_warnings():
        show = warnings.showwarning
        warnings.simplefilter("always")

        def count(message: Any, *args: Any, **options: Any) -> None:
            kind = re.sub(r"\d+|'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "…", str(message))[:200]
            if kind not in counts and len(counts) >= 1000:
                return
            counts[kind] += 1
            if counts[kind] <= most:
                show(message, *args, **options)

        warnings.showwarning = count
        try:
            yield
        finally:
            warnings.showwarning = show
            for kind, number in counts.items():
                if number > most:
                    warnings.warn(f"{number - most:,} more times: {kind}", stacklevel=1)


def failures_file(output: Path, process: tuple[int, int]) -> Path:
    """Where the failures of a process stand."""
    index, count = process
    return output / ("failures.jsonl" if count == 1 else f"failures-{index:05d}-of-{count:05d}.jsonl")
