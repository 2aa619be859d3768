"""One update of each latent trainer against PyTorch diffusers: the loss to 1e-5, what was trained to 1e-4."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

cases = pytest.importorskip("tests.oracle.training_cases", reason="needs PyTorch diffusers and transformers")


@pytest.mark.parametrize("name", cases.CASES)
def test_one_update(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    if "LoRA" in name:
        pytest.importorskip("peft", reason="PyTorch diffusers loads LoRA through peft")
    errors = cases.CASES[name](tmp_path, rng)
    assert errors.loss < 1e-5
    assert errors.parameters < 1e-4
