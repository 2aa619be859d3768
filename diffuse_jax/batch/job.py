"""Batch sampling as a job that can be interrupted, continued and divided: :func:`sample_many`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffuse_jax.batch.device import AUTO, Device
from diffuse_jax.batch.encoding import SUFFIXES
from diffuse_jax.batch.jobs import FIELDS, OF_IMAGES, Rules, checked
from diffuse_jax.batch.lines import Lines, lines_of
from diffuse_jax.batch.loop import Job, Maker, Ran, Survey, run, survey
from diffuse_jax.batch.reporting import Failure, Failures, Status, failures_file, few_warnings
from diffuse_jax.batch.sinks import Folders, Shards, Sink, parsed
from diffuse_jax.output import writable
from diffuse_jax.writing import atomic_file

LAYOUTS: Mapping[str, Callable[[Path], Sink]] = {"folder": Folders, "webdataset": Shards}
"""How images are laid out in the output folder."""

ROWS_PER_BLOCK = 1000
"""Rows whose images share a folder or a shard."""

SETTINGS = "job.json"
"""The file with the settings of a job, in its output folder."""

LARGEST_SEED = 2**32 - 1


class Report(NamedTuple):
    """What a run of a job did.

    Attributes:
      images: how many the prompts ask this process for.
      before: how many were there already.
      made: how many this run made.
      flagged: of these, those that the safety checker flagged; they are black.
      failed: rows and images that failed.
      failures: the first of them; all are in ``failures_file``.
      failures_file: one JSON object per line; None if nothing failed.
      stopped: whether the run was stopped before the end.
      seconds: how long it took.
      waited: the part of the time, without compilation, in which the device had nothing to do.
    """

    images: int
    before: int
    made: int
    flagged: int
    failed: int
    failures: Sequence[Failure]
    failures_file: Path | None
    stopped: bool
    seconds: float
    waited: float


def sample_many(
    pipe: Any,
    prompts: Any,
    output: str | Path,
    *,
    batch_size: int | str = AUTO,
    layout: str = "folder",
    image_format: str = "png",
    quality: int = 95,
    rows_per_block: int | None = None,
    process: tuple[int, int] = (0, 1),
    seed: int = 0,
    keep: Sequence[str] = (),
    common: Mapping[str, Any] | None = None,
    report: Callable[[Status], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    dry_run: bool = False,
    **defaults: Any,
) -> Report:
    """Make an image for each row of prompts and each of its seeds, and write it with its settings.

    Prompts are read as they are needed, so their number does not matter. A second call with the same arguments makes
    what is missing. The pixels of an image depend on its row alone, up to rounding where programs of another size or
    on another mesh round differently.

    Args:
      pipe: a text-to-image pipeline; images are divided over its mesh, which must be of this process's devices.
      prompts: a ``.txt`` file with a prompt per line; a ``.jsonl``, ``.csv`` or ``.parquet`` file whose rows have a
        ``prompt`` and any of the settings ``FIELDS``; or a list of texts and dicts.
      output: the folder; created if needed.
      batch_size: number of images per device call, over all devices; "auto" finds what fits into memory.
      layout: "folder", image files in folders with a ``metadata.jsonl`` each; or "webdataset", tar shards.
      image_format: "png", "webp" or "jpeg".
      quality: of WebP and JPEG, 1 to 100.
      rows_per_block: rows whose images share a folder or shard; 1000, or fewer so that each process has some. A job
        that is continued keeps its number.
      process: ``(index, count)``: this process makes every ``count``-th block; all write to the same folder, or each to
        its own.
      seed: row ``n``, counted from 1, has the seed ``seed + n`` unless it names seeds; see
        :class:`~diffuse_jax.batch.jobs.Rules`.
      keep: fields of the rows that are no settings, to be stored with the images.
      common: settings to store with every image, such as the model's name.
      report: called about once a second with how far the run is.
      stop: asked often; once it is true, the device calls under way are finished and written, and the run ends.
      dry_run: only read the prompts and compare them with the images that are there.
      **defaults: settings (``FIELDS``) for rows that do not have their own.

    Returns:
      What was done. Rows that are malformed or refused, and images that could not be written, do not end a run; see
      ``failures``.

    Raises:
      ValueError: an argument is wrong, or the folder has images of other settings or other prompts.
      TypeError: the pipeline does not make images from prompts alone, or an argument does not exist.
      OSError: the prompts cannot be read, or the folder cannot be written.
      RuntimeError: many images in a row could not be written.

    Example::

        report = sample_many(pipe, ["a red apple", {"prompt": "a heart", "seed": [1, 2]}], "images", height=64)
    """
    if unknown := [name for name in defaults if name not in FIELDS or name in ("prompt", "seed")]:
        raise TypeError(f"sample_many has no argument {unknown[0]}; settings of rows are {', '.join(FIELDS)}")
    check_choice(layout, LAYOUTS, "layout")
    check_choice(image_format, SUFFIXES, "image_format")
    check_whole(quality, "quality", 1, 100)
    check_whole(seed, "seed", 0, LARGEST_SEED)
    if batch_size != AUTO:
        check_whole(batch_size, "batch_size", 1, 2**20)
    if rows_per_block is not None:
        check_whole(rows_per_block, "rows_per_block", 1, 10**6)
    index, count = process
    if not 0 <= index < count:
        raise ValueError(f"process must be (index, count) with 0 <= index < count, got {process}")
    shared = dict(common or {}) | {"scheduler": type(pipe.scheduler).__name__}
    if clash := [name for name in keep if name in (*FIELDS, *OF_IMAGES, *shared)]:
        raise ValueError(f"keep names {clash[0]!r}, which is stored with every image anyway; rename the field")
    rules = Rules(checked(defaults), seed, tuple(keep), shared)
    lines = lines_of(prompts, rules.known)
    output = writable(Path(output))
    device = Device(pipe, batch_size)
    try:
        files = {"layout": layout, "image_format": image_format, "quality": quality}
        given = {**files, "seed": seed, "keep": [*keep], **shared, **rules.defaults}
        sink, file = LAYOUTS[layout](output), output / SETTINGS
        begun = any(LAYOUTS[one](output).last() >= 0 for one in LAYOUTS)
        settings = agree(file, given, lines, rows_per_block, count, begun=begun)
        if not dry_run:
            with atomic_file(file) as to:
                to.write(json.dumps(settings, indent=1).encode())
        job = Job(lines, rules, sink, image_format, quality, settings["rows_per_block"], (index, count))
        return sample(job, device, failures_file(output, process), report=report, stop=stop, dry_run=dry_run)
    finally:
        device.close()


def sample(
    job: Job,
    device: Maker,
    failures_path: Path,
    *,
    report: Callable[[Status], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    dry_run: bool = False,
) -> Report:
    """Run a job whose arguments have been checked, with whatever makes its images; see :func:`sample_many`."""
    start = time.perf_counter()
    with few_warnings():
        counted = survey(job)
        if dry_run:
            return _report(counted, Ran(0, 0, False), None, start, 0.0)
        failures = Failures(failures_path)
        try:
            ran = run(job, device, counted, failures, report=report, stop=stop)
        finally:
            failures.close()
    return _report(counted, ran, failures, start, device.clock.share)


def _report(counted: Survey, ran: Ran, failures: Failures | None, start: float, waited: float) -> Report:
    failed = counted.malformed if failures is None else failures.count
    return Report(
        images=counted.images,
        before=counted.done,
        made=ran.made,
        flagged=ran.flagged,
        failed=failed,
        failures=() if failures is None else tuple(failures.first),
        failures_file=failures.path if failures is not None and failed else None,
        stopped=ran.stopped,
        seconds=time.perf_counter() - start,
        waited=waited,
    )


def agree(
    path: Path, settings: Mapping[str, Any], lines: Lines, rows_per_block: int | None, processes: int, *, begun: bool
) -> dict[str, Any]:
    """The settings of a job with its rows per block, compared with those that it was begun with.

    Args:
      path: the file with those.
      settings: what this run was given.
      lines: the prompts.
      rows_per_block: if they were given too.
      processes: how many share the job.
      begun: whether there are images of the job; if not, the file does not matter.

    Raises:
      ValueError: the settings differ.
    """
    now = json.loads(json.dumps({**settings, "rows_per_block": rows_per_block}))
    if not begun or not path.exists():
        if rows_per_block is None:
            last = max((row.number for row in lines.rows()), default=1) if processes > 1 else ROWS_PER_BLOCK
            now["rows_per_block"] = min(ROWS_PER_BLOCK, -(-last // processes)) if processes > 1 else ROWS_PER_BLOCK
        return now
    if (before := parsed(path.read_bytes())) is None:
        raise ValueError(f"{path} is damaged; remove it to continue the job with its present settings")
    if rows_per_block is None:
        now["rows_per_block"] = before.get("rows_per_block")
    for name in (*now, *before):
        if (name in now, now.get(name)) != (name in before, before.get(name)):
            raise ValueError(
                f"{path.parent} has images with {name} {before.get(name)!r}, not {now.get(name)!r}; continue with the "
                "same settings, or choose another output folder"
            )
    return now


def check_choice(value: Any, known: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if the value is not one of those known."""
    if value not in known:
        raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}")


def check_whole(value: Any, name: str, least: int, most: int) -> None:
    """Raise ValueError if the value is not a whole number in these bounds."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
