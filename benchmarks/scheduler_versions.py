"""Where the samplers of diffusers 0.24 and of its newest release differ, and on which side this library is.

    python -m benchmarks.scheduler_versions

Makes a virtual environment with diffusers 0.24 under ``.cache/venvs``, runs every configuration of the parity benchmark
there and here, in float64, and lists those whose trajectories part.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import scheduler_parity as parity
from benchmarks.scheduler_cases import cases
from benchmarks.scheduler_cases.case import Case

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
    rows = [row for case in cases() if (row := compare(case, old, new, noise))]
    for row in rows:
        print(row)
    about = (
        "Configurations of the parity benchmark that give other trajectories in diffusers 0.24 than in the newest "
        f"release (more than {DIFFERENT:g} apart, both in float64, {STEPS[0]} and {STEPS[1]} steps), and how far this "
        "library is from each. No number: that release does not have the class or refuses the options."
    )
    write("scheduler_versions", "Samplers of diffusers 0.24 and of today", about, rows, "diffusers", "torch")


def trajectories() -> dict[str, np.ndarray]:
    """What the diffusers of this interpreter gives, by case and number of steps; without what it cannot run."""
    noise, out = parity.make_noise(), {}
    for case in cases():
        for n in chosen(case):
            try:
                out[key(case, n)] = parity.torch_trajectory(case, n, noise, double=True)
            except Exception as error:
                print(f"{key(case, n)}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
    return out


def compare(
    case: Case, old: dict[str, np.ndarray], new: dict[str, np.ndarray], noise: np.ndarray
) -> dict[str, Any] | None:
    """A row of the table, None where the releases agree."""
    apart, ours_old, ours_new = [], [], []
    for n in chosen(case):
        ours = parity.numpy_trajectory(case, n, noise)
        a, b = old.get(key(case, n)), new.get(key(case, n))
        apart += [between(a, b)] if a is not None and b is not None else []
        ours_old += [between(ours, a)] if a is not None else []
        ours_new += [between(ours, b)] if b is not None else []
    if ours_old and ours_new and max(apart) < DIFFERENT:
        return None
    return {
        "scheduler": case.scheduler,
        "configuration": case.label,
        "0.24 to newest": max(apart, default=None),
        "ours to 0.24": max(ours_old, default=None),
        "ours to newest": max(ours_new, default=None),
    }


def chosen(case: Case) -> list[int]:
    return [n for n in case.steps if n in STEPS] or [n for n in case.steps if n <= max(STEPS)][-1:]


def key(case: Case, n: int) -> str:
    return f"{case} {n}"


def between(a: np.ndarray, b: np.ndarray) -> float:
    """Largest relative difference; of the last samples alone where the trajectories have different lengths."""
    if a.shape != b.shape:
        a, b = a[-1:], b[-1:]
    error = np.abs(a - b).max() / np.abs(b).max()
    return float(f"{error:.2g}") if np.isfinite(error) else float("inf")


if __name__ == "__main__":
    main()
