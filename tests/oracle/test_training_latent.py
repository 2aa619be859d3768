"""One training step of each latent trainer against PyTorch diffusers: the loss, every gradient and what is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffuse_jax.torch_backend.training_report import verdict

cases = pytest.importorskip("tests.oracle.training_cases", reason="needs PyTorch diffusers and transformers")


# What these combine is in the other cases: pairs and the sizes of XL in text to image with LoRA, prior preservation in
# DreamBooth, ControlNets and edits with SD.
COMBINED = (
    "text to image with LoRA, SD",
    "DreamBooth with LoRA and prior preservation, SDXL",
    "text to image, SDXL",
    "ControlNet, SDXL",
    "InstructPix2Pix, SDXL",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in COMBINED)) for name in cases.CASES]
)
def test_one_training_step(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    if "LoRA" in name:
        pytest.importorskip("peft", reason="PyTorch diffusers loads LoRA through peft")
    compared = cases.CASES[name](tmp_path, rng)
    assert compared.ok, verdict(compared)
    assert {row.name for row in compared.values} >= {"noised latents", "prediction", "mse", "loss"}
    assert len(compared.gradients) >= len(compared.changes) > 0
