"""One training step of DRaFT and of DDPO against PyTorch: the same weights, noise and trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax.torch_backend.training_report import TOLERANCES, compare_updates, verdict
from tests.train.latent_models import save_sd

cases = pytest.importorskip("tests.oracle.reward_cases", reason="needs PyTorch diffusers and transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("sd"), fresh=False)


def compared(steps: Any, exact: float) -> Any:
    """Our update, if all gradients and changes agree with PyTorch's, the loss to ``exact`` and the median parameter
    after the step to 1e-5."""
    before = {name: p.detach().numpy().copy() for name, p in steps.parameters.items()}
    ours, theirs = steps.updates()
    found = compare_updates(ours, theirs, TOLERANCES["float32"])
    assert found.ok, verdict(found)
    assert {*theirs.gradients} == {*ours.gradients}
    wanted = float(theirs.values["loss"])
    assert abs(float(ours.values["loss"]) - wanted) <= exact * abs(wanted), (ours.values["loss"], wanted)
    moved = [
        np.linalg.norm(ours.changes[n] - theirs.changes[n]) / np.linalg.norm(before[n] + theirs.changes[n])
        for n in theirs.changes
    ]
    assert np.median(moved) < 1e-5, max(moved)
    return ours


def test_draft(folder: Path, rng: np.random.Generator) -> None:
    """All weights of the UNet, through guidance, the last two steps of three and the decoder."""
    compared(cases.draft(folder, rng), 1e-6)


def test_ddpo(folder: Path, rng: np.random.Generator) -> None:
    """Low-rank pairs, at the second step of trajectories, one of whose ratios is clipped."""
    pytest.importorskip("peft", reason="PyTorch diffusers loads LoRA through peft")
    ours = compared(cases.ddpo(folder, rng), 5e-6)
    assert float(ours.values["clip_fraction"]) == 0.5
