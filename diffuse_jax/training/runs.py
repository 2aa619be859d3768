"""Runs of training, read again from their folders: ``training.yaml`` and ``log.jsonl``."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffuse_jax.training.configuration import CONFIG_FILE, read_config

LOG_FILE = "log.jsonl"
LAST = 0.1
"""The share of a run, at its end, that its loss is averaged over."""

PLACES = ("output_dir", "logging_dir", "overwrite_output_dir", "resume_from_checkpoint", "tracker_project_name")
"""Flags that say where a run is, not what it does."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of training.

    Attributes:
      folder: its ``--output_dir``.
      flags: its flags by name, as in ``training.yaml``; empty if that file is missing.
      log: its records in the order of their steps, as in ``log.jsonl``.
    """

    folder: Path
    flags: dict[str, Any]
    log: list[dict[str, Any]]

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric; empty if the records do not have it."""
        records = [r for r in self.log if isinstance(r.get(name), int | float)]
        return [r["step"] for r in records], [float(r[name]) for r in records]

    def summary(self) -> dict[str, Any]:
        """What the table shows: step, loss over the last tenth of the run, rate and speed; None for what is unknown."""
        steps, losses = self.curve("loss")
        last = [loss for step, loss in zip(steps, losses, strict=True) if step > (1 - LAST) * steps[-1]]
        _, rates = self.curve("learning_rate")
        _, speeds = self.curve("steps_per_second")
        _, elapsed = self.curve("elapsed_seconds")
        return {
            "run": str(self.folder),
            "step": steps[-1] if steps else 0,
            "loss": sum(last) / len(last) if last else None,
            "lowest loss": min(losses, default=None),
            "learning rate": rates[-1] if rates else None,
            "steps/s": sorted(speeds)[len(speeds) // 2] if speeds else None,
            "minutes": elapsed[-1] / 60 if elapsed else None,
        }


def read_run(folder: str | Path) -> Run:
    """Read a run's folder.

    A line that a killed run left half-written at the end of the log is left out.

    Raises:
      FileNotFoundError: the folder has no log.
      ValueError: another line of the log, or ``training.yaml``, cannot be read.
    """
    path = Path(folder) / LOG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {LOG_FILE}; give the --output_dir of a run, or a folder with such")
    lines, log = path.read_text(encoding="utf-8").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            log.append({**record, "step": int(record["step"])})
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a record of a step: {line[:60]!r}") from None
    config = Path(folder) / CONFIG_FILE
    return Run(Path(folder), read_config(config) if config.is_file() else {}, log)


def find_runs(folders: Iterable[str | Path]) -> list[Run]:
    """The runs in these folders: each is one itself, or has some below it, by name.

    Raises:
      FileNotFoundError: a folder does not exist, or there is no run in it.
      ValueError: as for :func:`read_run`.
    """
    found: dict[Path, Run] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; give the --output_dir of a run, or a folder with such")
        inside = [folder] if (folder / LOG_FILE).is_file() else sorted(p.parent for p in folder.rglob(LOG_FILE))
        if not inside:
            raise FileNotFoundError(f"there is no run in {folder}: no folder in it has a {LOG_FILE}")
        for path in inside:
            found.setdefault(path.resolve(), read_run(path))
    return list(found.values())


def differing_flags(runs: Sequence[Run]) -> list[str]:
    """The flags whose values differ between the runs, apart from those that only say where a run is."""
    names = dict.fromkeys(name for run in runs for name in run.flags if name not in PLACES)
    return [name for name in names if any(run.flags.get(name) != runs[0].flags.get(name) for run in runs)]


def comparison(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each run: its summary, and the flags in which the runs differ."""
    flags = differing_flags(runs)
    return [run.summary() | {name: run.flags.get(name) for name in flags} for run in runs]


def plot(runs: Sequence[Run], path: str | Path) -> None:
    """Draw loss and learning rate over the steps of the runs, in the format that the ending of ``path`` names.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: matplotlib does not know the format.
      OSError: the file cannot be written.
    """
    plt, ending = pyplot(), Path(path).suffix[1:].lower()
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(8, 6), height_ratios=(3, 1), layout="constrained")
    for run, name in zip(runs, _short([run.folder for run in runs]), strict=True):
        above.plot(*run.curve("loss"), label=name)
        below.plot(*run.curve("learning_rate"), label=name)
    if all(value > 0 for run in runs for value in run.curve("loss")[1]):
        above.set_yscale("log")
    above.set_ylabel("loss")
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    if len(runs) > 1:
        above.legend()
    known = figure.canvas.get_supported_filetypes()
    try:
        if ending not in known:
            raise ValueError(f"{path}: a plot is one of {', '.join(sorted(known))}; end its name with one of these")
        figure.savefig(path)
    finally:
        plt.close(figure)


def pyplot() -> Any:
    """matplotlib, for files: it needs no display.

    Raises:
      ImportError: it is not installed; the message says how to install it.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "diffusejax[plots]"') from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _short(folders: Sequence[Path]) -> list[str]:
    """The ends of paths, as long as they need to be to differ."""
    longest = max(len(folder.parts) for folder in folders)
    for count in range(1, longest):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def cell(value: Any) -> str:
    """A value as a cell of the table."""
    if value is None:
        return "-"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
