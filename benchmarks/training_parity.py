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
    " captions, noise and timesteps, in float32 on the CPU. `loss`: relative difference, bound 1e-5. `parameters`:"
    " largest absolute difference of what was trained, bound 1e-4 (a step of AdamW is 1e-3)."
)
PACKAGES = ("jax", "optax", "torch", "diffusers", "transformers", "peft")


def main() -> None:
    rows = []
    for name, case in training_cases.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            errors = case(Path(folder), np.random.default_rng(0))
        rows.append({"trainer": name, "loss": errors.loss, "parameters": errors.parameters})
        print(rows[-1], flush=True)
    print(common.write("training_parity", "Training steps against PyTorch", ABOUT, rows, *PACKAGES))


if __name__ == "__main__":
    main()
