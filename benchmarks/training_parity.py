"""Difference between one training step of each latent-model trainer and PyTorch diffusers'.

    python -m benchmarks.training_parity
    python -m benchmarks.training_parity --missing    # only what the table lacks; its other rows stay as they are

Writes ``docs/results/training_parity.json``: the cases of ``tests/oracle/training_cases.py`` and
``tests/oracle/family_cases.py``, and the shipped model as ``diffuse-jax parity diffuse-jax/emoji --training`` compares
it.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import common
from diffuse_jax.torch_backend.training_parity import TrainingRequest, compare_training
from diffuse_jax.torch_backend.training_report import TOLERANCES, Compared
from tests.oracle import family_cases, training_cases

ABOUT = (
    "One AdamW step with clipping and Min-SNR, from the same weights, images, captions, noise and timesteps, on the"
    " CPU; small networks with random weights, and the shipped model. Largest relative errors (norm of the difference"
    " over norm of PyTorch's): of the loss and what it is computed from, of any parameter's gradient, and of any"
    " parameter's change. Bounds are 1e-4, 1e-3 and 1e-2 in float32, 0.05, 0.3 and 0.1 in bfloat16."
)
SHIPPED = {
    "shipped model": TrainingRequest(batch_size=4, snr_gamma=5.0, train_text_encoder=True),
    "shipped model, LoRA": TrainingRequest(batch_size=4, snr_gamma=5.0, train_text_encoder=True, method="lora"),
}
PACKAGES = ("jax", "optax", "torch", "diffusers", "transformers", "peft")
GROUPS = ("values", "gradients", "changes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", action="store_true", help="run what the table lacks, and keep its other rows")
    old = common.table("training_parity") if parser.parse_args().missing else []
    found = rows(common.keys(old, "trainer", "dtype"))
    print(common.extend("training_parity", "Training steps against PyTorch", ABOUT, old, found, *PACKAGES))


def rows(known: Container[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """One row per comparison, except those of the pairs of trainer and dtype that are ``known``."""
    for name, case in (training_cases.CASES | family_cases.CASES).items():
        if (name, "float32") in known:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = case(Path(folder), np.random.default_rng(0))
            yield row(name, "float32", getattr(found, "compared", found))
    for name, request in SHIPPED.items():
        for dtype in TOLERANCES:
            if (name, dtype) not in known:
                typed = dataclasses.replace(request, dtype=dtype)
                yield row(name, dtype, compare_training("diffuse-jax/emoji", typed, device="cpu"))


def row(name: str, dtype: str, found: Compared) -> dict[str, Any]:
    """The table row of one comparison."""
    worst = {group: max(r.relative_error for r in getattr(found, group)) for group in GROUPS}
    line = {"trainer": name, "dtype": dtype, **worst, "parameters": len(found.changes), "same": found.ok}
    print(line, flush=True)
    jax.clear_caches()  # no program is used again
    return line


if __name__ == "__main__":
    main()
