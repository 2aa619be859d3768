"""How far one update of each trainer of latent models is from PyTorch diffusers'.

    python -m benchmarks.training_parity

Writes ``docs/results/training_parity.json``: the cases of ``tests/oracle/training_cases.py``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks import common
from tests.oracle import training_cases

ABOUT = (
    "One update of AdamW with clipping and Min-SNR, from the same small networks with random weights, pictures,"
    " captions, noise and timesteps, in float32 on the CPU. Largest relative errors (norm of the difference over norm"
    " of PyTorch's): of the loss and what it is made from, bound 1e-4; of any parameter's gradient, bound 1e-3; of what"
    " the update added to any parameter, bound 1e-2 (float32 holds a parameter near 1 to a ten-thousandth of a step)."
)
PACKAGES = ("jax", "optax", "torch", "diffusers", "transformers", "peft")
GROUPS = ("values", "gradients", "changes")


def main() -> None:
    rows = []
    for name, case in training_cases.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = case(Path(folder), np.random.default_rng(0))
        worst = {group: max(row.relative_error for row in getattr(found, group)) for group in GROUPS}
        rows.append({"trainer": name, **worst, "parameters": len(found.changes)})
        print(rows[-1], flush=True)
    print(common.write("training_parity", "Training steps against PyTorch", ABOUT, rows, *PACKAGES))


if __name__ == "__main__":
    main()
