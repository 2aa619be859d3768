"""Where the samplers of diffusers 0.24 and of its newest release differ, and which of them this library follows.

    python -m benchmarks.scheduler_versions

Creates a virtual environment with diffusers 0.24 under ``.cache/venvs``, runs every configuration of the parity
benchmark there and here, in float64, and counts those whose trajectories differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import scheduler_parity as parity
from benchmarks.scheduler_cases import cases
from benchmarks.scheduler_cases.case import Case
from diffuse_jax import schedulers

REQUIREMENTS = ["torch==2.13.0", "diffusers==0.24.0", "huggingface_hub==0.23.5", "numpy", "scipy", "torchsde"]
STEPS = (5, 20)
DIFFERENT = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python3.11", help="interpreter for diffusers 0.24")
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.dump:
        np.savez(args.dump, **trajectories())
        return
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from common import ROOT, make_venv, write

    old_python = make_venv("diffusers-0.24", args.python, REQUIREMENTS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "old.npz"
        command = [old_python, "-m", "benchmarks.scheduler_versions", "--dump", path]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        old = dict(np.load(path))
    new, noise = trajectories(), parity.make_noise()
    compared: dict[str, list[Comparison]] = {}
    for case in cases():
        compared.setdefault(case.scheduler, []).append(compare(case, old, new, noise))
    rows = [row(name, results) for name, results in compared.items()]
    for line in rows:
        print(line)
    about = (
        "Configurations of the parity benchmark in diffusers 0.24 and in its newest release, both in float64, at "
        f"{STEPS[0]} and {STEPS[1]} steps: how many there are, how many 0.24 lacks (the class or an option), how "
        f"many have a different trajectory there (by more than {DIFFERENT:g}), and the largest difference. This "
        "library follows the newest; the last column is its difference from 0.24 in those configurations with "
        "`final_sigmas_type='sigma_min'`, where 0.24 always ended."
    )
    write("scheduler_versions", "Samplers of diffusers 0.24 and of today", about, rows, "diffusers", "torch")


class Comparison(NamedTuple):
    """Largest differences over the step counts; None where a side cannot run the configuration."""

    releases: float | None
    as_before: float | None


def row(name: str, results: list[Comparison]) -> dict[str, Any]:
    """The table row of one scheduler."""
    both = [c for c in results if c.releases is not None]
    other = [c for c in both if c.releases > DIFFERENT]
    # Where 0.24 gives NaN there is nothing to compare with.
    before = [c.as_before for c in other if c.as_before is not None and np.isfinite(c.releases)]
    worst = max((c.releases for c in other), default=None)
    return {
        "scheduler": name,
        "configurations": len(results),
        "not in 0.24": len(results) - len(both),
        "other trajectory": len(other),
        "largest difference": "not a number in 0.24" if worst == np.inf else worst,
        "ours as in 0.24": max(before, default=None),
    }


def trajectories() -> dict[str, np.ndarray]:
    """Trajectories of this interpreter's diffusers by case and number of steps, without cases that it cannot run."""
    noise, out = parity.make_noise(), {}
    for case in cases():
        for n in chosen(case):
            try:
                out[key(case, n)] = parity.torch_trajectory(case, n, noise, double=True)
            except Exception as error:
                print(f"{key(case, n)}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
    return out


def compare(case: Case, old: dict[str, np.ndarray], new: dict[str, np.ndarray], noise: np.ndarray) -> Comparison:
    """Compare one configuration."""
    releases, before = [], []
    earlier = dataclasses.replace(case, config=case.config | {"final_sigmas_type": "sigma_min"})
    has_final = "final_sigmas_type" in getattr(schedulers, case.scheduler).__dataclass_fields__
    for n in chosen(case):
        a, b = old.get(key(case, n)), new.get(key(case, n))
        if a is None or b is None:
            return Comparison(None, None)
        releases.append(between(a, b))
        if has_final and "final_sigmas_type" not in case.config:
            before.append(between(parity.numpy_trajectory(earlier, n, noise), a))
    return Comparison(max(releases), max(before, default=None))


def chosen(case: Case) -> list[int]:
    return [n for n in case.steps if n in STEPS] or [min(case.steps)]


def key(case: Case, n: int) -> str:
    return f"{case} {n}"


def between(a: np.ndarray, b: np.ndarray) -> float:
    """Largest relative difference; of the last samples alone if the trajectories have different lengths."""
    if a.shape != b.shape:
        a, b = a[-1:], b[-1:]
    error = np.abs(a - b).max() / np.abs(b).max()
    return float(f"{error:.2g}") if np.isfinite(error) else float("inf")


if __name__ == "__main__":
    main()
