"""A job from its prompts to its last image: what is left to do, the loop over batches, and the threads that write."""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from diffuse_jax.batch.device import Batch, Call, Clock, Made
from diffuse_jax.batch.encoding import SUFFIXES, encoded
from diffuse_jax.batch.grouping import batches
from diffuse_jax.batch.jobs import Image, Rules
from diffuse_jax.batch.lines import Lines
from diffuse_jax.batch.reporting import Failure, Failures, Progress, Status
from diffuse_jax.batch.sinks import Block, Sink
from diffuse_jax.command import is_mistake
from diffuse_jax.pipelines.parts.safety import FLAGGED

WINDOW = 4096
"""How many images are looked at to find those that can share a batch."""

WRITERS = 8
"""Threads that encode and write, at most one for each core."""


class Maker(Protocol):
    """What makes the images: :class:`~diffuse_jax.batch.device.Device`."""

    largest: int
    ahead: int
    clock: Clock

    def group(self, image: Image) -> Hashable: ...

    def batch(self, images: Sequence[Image]) -> Batch: ...

    def start(self, batch: Batch) -> Iterator[Call]: ...

    def finish(self, call: Call) -> list[Made]: ...


class Job(NamedTuple):
    """What a run works on.

    Attributes:
      lines: the prompts.
      rules: how they are read.
      sink: where the images go.
      kind: the format of the images, one of :data:`~diffuse_jax.batch.encoding.SUFFIXES`.
      quality: of JPEG and WebP.
      rows_per_block: rows whose images share a folder or shard.
      process: the number of this process, and how many there are; each works on its own blocks.
    """

    lines: Lines
    rules: Rules
    sink: Sink
    kind: str
    quality: int
    rows_per_block: int
    process: tuple[int, int] = (0, 1)

    def name(self, image: Image) -> str:
        """The name of the file of an image."""
        return f"{image.key}.{SUFFIXES[self.kind]}"

    def block(self, number: int) -> int:
        """The block of a row."""
        return (number - 1) // self.rows_per_block

    def blocks(self) -> Iterator[tuple[int, Iterator[Any]]]:
        """The blocks of this process with their rows, read as they are needed."""
        index, count = self.process
        by_block = itertools.groupby(self.lines.rows(), lambda row: self.block(row.number))
        return ((block, rows) for block, rows in by_block if block % count == index)


class Survey(NamedTuple):
    """What the prompts ask for.

    Attributes:
      images: of the rows of this process.
      done: of these, those that are there.
      malformed: rows that cannot be read.
    """

    images: int
    done: int
    malformed: int


class Ran(NamedTuple):
    """What a run did.

    Attributes:
      made: images that it made.
      flagged: of these, those that the safety checker flagged.
      stopped: whether it was stopped before the end.
    """

    made: int
    flagged: int
    stopped: bool


def survey(job: Job) -> Survey:
    """Read all prompts of this process and compare them with the images that are there.

    Raises:
      ValueError: an image was made from other settings than its row has now, or no row asks for it.
    """
    images = done = malformed = 0
    last = -1
    for block, rows in job.blocks():
        recorded, last = job.sink.recorded(block), block
        for row in rows:
            try:
                made = job.rules.job(row.number, job.lines.fields(row.raw))
            except ValueError:
                malformed += 1
                continue
            images += len(made.seeds)
            for seed in made.seeds:
                if not recorded:  # a row may ask for more images than one could count
                    break
                image = Image(made, seed)
                name = job.name(image)
                if (before := recorded.pop(name, None)) is not None:
                    done += 1
                    check_same(before, job.rules.record(image, name), job.lines.name)
        if recorded:
            raise changed(job.lines.name, f"no row asks for {next(iter(recorded))} any more")
    if job.process[1] == 1 and job.sink.last() > last:
        raise changed(job.lines.name, "it had more rows")
    return Survey(images, done, malformed)


def check_same(before: dict[str, Any], now: dict[str, Any], name: str) -> None:
    """Check that an image that is there was made from the settings that its row has now.

    Raises:
      ValueError: it was not.
    """
    before = {key: value for key, value in before.items() if key != FLAGGED}
    if before == now:
        return
    key = next(key for key in (*now, *before) if before.get(key) != now.get(key) or (key in before) != (key in now))
    raise changed(name, f"{now['file_name']} was made with {key} {before.get(key)!r}, and row {now['line']} has "
                        f"{now.get(key)!r}")  # fmt: skip


def changed(name: str, how: str) -> ValueError:
    """The error for prompts that no longer belong to the images."""
    return ValueError(
        f"{name} has changed since its images were made ({how}); restore it, remove these images, or choose another "
        "output folder. Rows may be corrected where they failed, and added at the end"
    )


class Writing:
    """The blocks that are open, and the threads that encode and write.

    Attributes:
      flagged: how many images the safety checker has flagged.
    """

    def __init__(self, job: Job, failures: Failures, progress: Progress, threads: int) -> None:
        self._job, self._failures, self._progress = job, failures, progress
        self._open: dict[int, _Open] = {}
        self._mutex = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, "write")
        self._room = threading.BoundedSemaphore(4 * threads)  # images in memory that wait to be written
        self._bug: BaseException | None = None
        self.flagged = 0

    def expect(self, image: Image) -> None:
        """An image of a block will follow."""
        number = self._job.block(image.job.number)
        with self._mutex:
            if number not in self._open:
                self._open[number] = _Open(self._job.sink.open(number))
            self._open[number].left += 1

    def passed(self, number: int) -> None:
        """All images of a block have been announced."""
        with self._mutex:
            if number in self._open:
                self._open[number].passed = True
                self._close_if_done(number)
            elif self._job.sink.unfinished(number):  # the last run ended just before it would have closed it
                self._job.sink.open(number).close(True)

    def write(self, made: Made) -> None:
        """Encode and write an image, soon; waits if many are on their way."""
        self.flagged += bool(made.flagged)
        self._room.acquire()
        try:
            self._pool.submit(self._write, made).add_done_callback(self._note)
        except BaseException:
            self._room.release()
            raise
        self.check()

    def failed(self, image: Image, error: Exception) -> None:
        """An image that was announced will not come."""
        self._failures.add(Failure(image.job.number, image.seed, one_line(error)))
        self._finished(image, not isinstance(error, OSError))

    def check(self) -> None:
        """Raise what has gone wrong in a thread, except for images that could not be written."""
        if self._bug is not None:
            raise self._bug
        self._failures.check()

    def close(self) -> None:
        """Wait for the threads, and close what is open; it can be continued."""
        self._pool.shutdown()
        for one in self._open.values():
            one.block.close(False)
        self._open.clear()

    def _note(self, future: Future[None]) -> None:
        self._room.release()
        self._bug = self._bug or future.exception()

    def _write(self, made: Made) -> None:
        job, image, name = self._job, made.image, self._job.name(made.image)
        record = job.rules.record(image, name) | ({} if made.flagged is None else {FLAGGED: made.flagged})
        inside = {key: value for key, value in record.items() if key not in ("file_name", "text")}
        try:
            data = encoded(made.pixels, inside, job.kind, job.quality)
            self._open[job.block(image.job.number)].block.write(name, data, record)
        except (OSError, ValueError) as error:
            self._failures.written(False)
            self._failures.add(Failure(image.job.number, image.seed, one_line(error)))
            self._finished(image, False)
        else:
            self._failures.written(True)
            self._progress.count()
            self._finished(image, True)

    def _finished(self, image: Image, whole: bool) -> None:
        number = self._job.block(image.job.number)
        with self._mutex:
            one = self._open[number]
            one.left -= 1
            one.whole = one.whole and whole
            self._close_if_done(number)

    def _close_if_done(self, number: int) -> None:
        one = self._open[number]
        if one.passed and not one.left:
            del self._open[number]
            one.block.close(one.whole)


class _Open:
    """A block that is being written: how many images are to come, and whether none is missing so far."""

    def __init__(self, block: Block) -> None:
        self.block, self.left, self.passed, self.whole = block, 0, False, True


def run(
    job: Job,
    maker: Maker,
    counted: Survey,
    failures: Failures,
    *,
    report: Callable[[Status], None] | None,
    stop: Callable[[], bool],
) -> Ran:
    """Make the images that are missing."""
    progress = Progress(counted.images, counted.done, failures, report)
    writing = Writing(job, failures, progress, min(WRITERS, os.cpu_count() or 1))
    under_way: deque[Call] = deque()

    def deliver(most: int) -> None:
        while len(under_way) > most:
            for made in maker.finish(under_way.popleft()):
                writing.write(made)

    try:
        missing = _missing(job, maker, writing, failures, stop)
        for images in batches(missing, maker.largest, max(WINDOW, 2 * maker.largest)):
            for batch in _requests(maker, writing, images):
                calls = maker.start(batch)
                while not stop():
                    deliver(maker.ahead)  # the batch was prepared while they ran
                    if (call := next(calls, None)) is None:
                        break
                    under_way.append(call)
            writing.check()
            if stop():
                break
        deliver(0)
    finally:
        writing.close()
    writing.check()
    stopped = stop() and progress.done + failures.count < counted.images + counted.malformed
    return Ran(progress.made, writing.flagged, stopped)


def _missing(
    job: Job, maker: Maker, writing: Writing, failures: Failures, stop: Callable[[], bool]
) -> Iterator[tuple[Hashable, Image]]:
    """The images that are not there yet, each with its group, as the prompts are read."""
    for block, rows in job.blocks():
        done = job.sink.recorded(block).keys()
        for row in rows:
            if stop():
                return
            try:
                made = job.rules.job(row.number, job.lines.fields(row.raw))
                images = (image for seed in made.seeds if job.name(image := Image(made, seed)) not in done)
                if (first := next(images, None)) is None:
                    continue
                group = maker.group(first)  # a row has one
            except Exception as error:
                if not is_mistake(error):
                    raise
                failures.add(Failure(row.number, None, one_line(error)))
                continue
            for image in itertools.chain([first], images):
                writing.expect(image)
                yield group, image
        writing.passed(block)


def _requests(maker: Maker, writing: Writing, images: Sequence[Image]) -> Iterator[Batch]:
    """The batch of some images, in several parts if the pipeline refuses some of them."""
    try:
        yield maker.batch(images)
    except Exception as error:
        if not is_mistake(error):
            raise
        if len(images) == 1:
            writing.failed(images[0], error)
            return
        half = len(images) // 2
        yield from _requests(maker, writing, images[:half])
        yield from _requests(maker, writing, images[half:])


def one_line(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
