"""``diffuse-jax generate --prompts-file``: the flags of a job, its progress on stderr, and how signals end it."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffuse_jax.bounds import COUNT, NATURAL, number
from diffuse_jax.image_flags import IMAGES, NUMBERS
from diffuse_jax.output import writable
from diffuse_jax.training import watch

if TYPE_CHECKING:  # what follows loads JAX, which --help does not need
    from diffuse_jax.batch.job import Report
    from diffuse_jax.batch.reporting import Status

OF_JOBS: Mapping[str, Any] = {
    "layout": "folder",
    "image_format": "png",
    "quality": 95,
    "rows_per_block": None,
    "keep": (),
    "dry_run": False,
    "coordinator_address": None,
    "num_processes": None,
    "process_id": None,
}
"""Flags that belong to ``--prompts-file`` alone -> their defaults."""

NOT_OF_JOBS = ("progress_bar", *IMAGES, "controlnet", *NUMBERS)
"""Flags that do not go with it."""

OF_MODELS = ("revision", "variant", "tokenizer", "prediction_type", "ema", "dtype", "no_safety_checker")
"""Flags that change the images of a model: a job that was begun with others is not continued."""

EVERY = 30.0
"""Seconds between lines of progress where they are not on a terminal."""


def batch_size(text: str) -> Any:
    """An argparse type: a number of images, or ``auto``."""
    return text if text == "auto" else number(COUNT)(text)


def add_flags(command: argparse.ArgumentParser) -> None:
    """Add the flags of a job."""
    add = command.add_argument_group("with --prompts-file", "rows may have settings of their own").add_argument
    about = "image files in folders of 1000 rows, or WebDataset shards (default: folder)"
    add("--layout", choices=("folder", "webdataset"), help=about)
    add("--image-format", choices=("png", "webp", "jpeg"), help="format of the images (default: png)")
    add("--quality", type=number(COUNT), metavar="N", help="of WebP and JPEG, 1 to 100 (default: 95)")
    about = "rows whose images share a folder or shard (default: 1000, or fewer so that each process has some)"
    add("--rows-per-block", type=number(COUNT), metavar="N", help=about)
    add("--keep", action="append", metavar="FIELD", help="store this field of the rows with the images; repeatable")
    add("--dry-run", action="store_true", default=None, help="count what is there and what is to be made, and end")
    about = "number of processes that share the job"
    add("--num-processes", type=number(COUNT), metavar="N", help=about)
    add("--process-id", type=number(NATURAL), metavar="N", help="which of them this is, from 0")
    about = "address of process 0, for processes that JAX should join; without it each works by itself"
    add("--coordinator-address", metavar="HOST:PORT", help=about)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, and give those of a job their defaults.

    Raises:
      ValueError: names the flags.
    """
    flag = lambda name: "--" + name.replace("_", "-")
    job = args.prompts_file is not None
    if not job and (wrong := [flag(name) for name in OF_JOBS if getattr(args, name) is not None]):
        raise ValueError(f"{', '.join(wrong)}: only with --prompts-file")
    if not job and args.batch_size == "auto":
        raise ValueError("--batch-size auto: only with --prompts-file")
    if job and (wrong := [flag(name) for name in NOT_OF_JOBS if getattr(args, name) is not None]):
        raise ValueError(f"{', '.join(wrong)}: not with --prompts-file")
    for name in ("seed", "negative_prompt"):
        if job and len(getattr(args, name) or ()) > 1:
            raise ValueError(f"{flag(name)} takes one value with --prompts-file; rows may have their own")
    if (args.num_processes is None) != (args.process_id is None):
        raise ValueError("give --num-processes and --process-id together")
    if args.num_processes is not None and args.process_id >= args.num_processes:
        raise ValueError(f"--process-id must be less than --num-processes {args.num_processes}, got {args.process_id}")
    if args.quality is not None and args.quality > 100:
        raise ValueError(f"--quality must be from 1 to 100, got {args.quality}")
    if args.coordinator_address is not None and args.num_processes is None:
        raise ValueError("--coordinator-address needs --num-processes and --process-id")
    for name, default in OF_JOBS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def generate(
    args: argparse.Namespace,
    call: Mapping[str, Any],
    open_pipe: Callable[[], Any],
    keep_programs: Callable[[Any], None],
) -> None:
    """Run the job of the flags and print the output folder.

    Args:
      args: the flags.
      call: those that are arguments of the pipeline's call.
      open_pipe: opens the pipeline, on this process's devices.
      keep_programs: called with the pipeline at the end.

    Raises:
      RuntimeError: some rows or images failed; the others are there.
      SystemExit: a signal ended the run; the status is 128 plus its number.
    """
    with args.prompts_file.open("rb"):  # a wrong name is an error now, not after minutes of loading
        pass
    writable(args.output)
    process = join(args)
    with watch.outcome_told(stops_alone=True):
        pipe = open_pipe()
        with stopping() as stop:
            report = sampled(args, call, pipe, process, stop)
        if not args.dry_run:
            keep_programs(pipe)
            print(args.output)
            if report.stopped:
                conclude(report, stop)
            together()
    if args.dry_run:
        print(f"{report.images} images, {report.before} there, {report.images - report.before} to make")
        if report.failed:
            raise RuntimeError(f"{report.failed} rows are malformed")
        return
    conclude(report, stop)


def sampled(
    args: argparse.Namespace, call: Mapping[str, Any], pipe: Any, process: tuple[int, int], stop: list[int]
) -> Report:
    """Run the job on one process of several, as (its number, how many); a number in ``stop`` ends it."""
    from diffuse_jax.batch.job import sample_many

    of_rows = ("prompt", "seed", "batch_size", "negative_prompt", "progress_bar")
    defaults = {name: value for name, value in call.items() if name not in of_rows}
    if args.negative_prompt:
        defaults["negative_prompt"] = args.negative_prompt[0]
    common: dict[str, Any] = {"model": str(args.model)}
    common |= {name: str(value) for name in OF_MODELS if (value := getattr(args, name))}
    if args.lora:
        common["merged_lora"] = {str(source): scale for source, scale in args.lora}
    line = ProgressLine()
    report = sample_many(
        pipe,
        args.prompts_file,
        args.output,
        batch_size="auto" if args.batch_size is None else args.batch_size,
        layout=args.layout,
        image_format=args.image_format,
        quality=args.quality,
        rows_per_block=args.rows_per_block,
        process=process,
        seed=(args.seed or [0])[0],
        keep=args.keep,
        common=common,
        report=line,
        stop=lambda: bool(stop),
        dry_run=args.dry_run,
        **defaults,
    )
    line.end()
    return report


def conclude(report: Report, stop: list[int]) -> None:
    """Say what was done; errors as of :func:`generate`."""
    for failure in report.failures:
        say(str(failure))
    if report.failed > len(report.failures):
        say(f"... and {report.failed - len(report.failures):,} more")
    rate = f" ({report.made / report.seconds:.2f} images/s)" if report.made else ""
    there = report.before + report.made
    say(
        f"{report.made:,} images made in {report.seconds:.0f} s{rate}, {there:,} of {report.images:,} there; the "
        f"device waited {100 * report.waited:.1f} % of the time"
    )
    if report.flagged:
        say(f"{report.flagged:,} images were flagged by the safety checker and are black")
    if report.stopped:
        say("to continue, run the same command again")
        raise SystemExit(128 + stop[0])
    if report.failed:
        raise RuntimeError(
            f"{report.failed:,} rows or images failed, see {report.failures_file}; the same command makes what is "
            "missing"
        )


class ProgressLine:
    """Shows how far a job is: on a terminal in one line that changes, else in a line every half minute."""

    def __init__(self) -> None:
        self._terminal, self._last, self._width = sys.stderr.isatty(), -EVERY, 0

    def __call__(self, status: Status) -> None:
        now = time.monotonic()
        if self._terminal:
            text = str(status)
            print(f"\r{text.ljust(self._width)}", end="", file=sys.stderr, flush=True)
            self._width = len(text)
        elif now - self._last >= EVERY:
            self._last = now
            say(str(status))

    def end(self) -> None:
        """Leave the line."""
        if self._width:
            print(file=sys.stderr, flush=True)


@contextlib.contextmanager
def stopping() -> Iterator[list[int]]:
    """A list that a signal (Ctrl-C, SIGTERM, SIGHUP) puts its number into. The second Ctrl-C interrupts at once."""
    received: list[int] = []

    def note(signum: int, frame: Any) -> None:
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if not received:
            say(f"\n{signal.Signals(signum).name}: finishing the images that are under way")
        received.append(signum)

    before = {one: signal.signal(one, note) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def join(args: argparse.Namespace) -> tuple[int, int]:
    """This process's number and the number of processes; joins them if the flags or the machine say so."""
    import jax

    from diffuse_jax.training.distributed import initialize_distributed
    from diffuse_jax.training.settings import ProcessSettings

    if args.num_processes is not None and args.coordinator_address is None:
        return args.process_id, args.num_processes
    initialize_distributed(
        ProcessSettings(
            coordinator_address=args.coordinator_address,
            num_processes=args.num_processes,
            process_id=args.process_id,
        ),
        "start all again with the same command, and they continue",
    )
    return jax.process_index(), jax.process_count()


def together() -> None:
    """Wait for the processes that JAX has joined: the end of one would be an error to the others."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the end of the job")


def say(message: str) -> None:
    """Print a message to the user on stderr."""
    print(message, file=sys.stderr, flush=True)
