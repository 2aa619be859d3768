"""One training step of DeepFloyd IF, Kandinsky 2.2 and Würstchen against PyTorch: the loss, every gradient, the update,
and that PyTorch diffusers opens what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax.torch_backend import training
from diffuse_jax.training.objective import Objective

steps = pytest.importorskip("tests.oracle.family_steps", reason="needs PyTorch diffusers and transformers")
folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
if_folders = pytest.importorskip("tests.oracle.if_folders", reason="needs PyTorch diffusers and transformers")

twin, torch, diffusers = steps.twin, folders.torch, folders.diffusers

LOSS, PARAMETERS = 1e-6, 1e-5
"""Accepted relative differences of the loss, and of the parameters after the step."""


def require_equal(found: tuple[float, float]) -> None:
    assert found[0] < LOSS, f"the loss differs by {found[0]:.1e}"
    assert found[1] < PARAMETERS, f"the parameters differ by {found[1]:.1e}"
    print(f"loss {found[0]:.1e}, parameters {found[1]:.1e}")


def if_step(folder: Path, stage: int, *, lora: bool, prior: bool = False, labels: str | None = None, rng: Any) -> None:
    if_folders.save(folder, stage)
    pipe = steps.opened(folder, ("unet",))
    kind = diffusers.IFPipeline if stage == 1 else diffusers.IFSuperResolutionPipeline
    theirs = kind.from_pretrained(folder)
    trained = training.low_rank(pipe, ["unet"], rank=3, seed=0) if lora else training.full(pipe, ["unet"])
    parameters = (
        twin.low_rank_parameters(theirs, trained.trainable) if lora else twin.full_parameters(theirs, ["unet"])
    )
    objective = Objective(scheduler=pipe.scheduler, snr_gamma=5.0, prior_loss_weight=0.7)
    batch = steps.batch_of(pipe, 16, rng, prior)
    loss = lambda: steps.if_loss(theirs, objective, batch, labels)
    require_equal(steps.compare(pipe, trained, batch, objective, parameters, loss, labels))


def test_if_first_stage(tmp_path: Path, rng: np.random.Generator) -> None:
    """With prior preservation, as in DreamBooth."""
    if_step(tmp_path, 1, lora=False, prior=True, rng=rng)


def test_if_first_stage_with_lora(tmp_path: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("peft", reason="PyTorch diffusers loads LoRA through peft")
    if_step(tmp_path, 1, lora=True, rng=rng)


@pytest.mark.parametrize("labels", [None, "timesteps"])
def test_if_second_stage(labels: str | None, tmp_path: Path, rng: np.random.Generator) -> None:
    if_step(tmp_path, 2, lora=False, labels=labels, rng=rng)


def test_kandinsky_decoder(tmp_path: Path, rng: np.random.Generator) -> None:
    prior = folders.kandinsky_prior(tmp_path / "prior")
    decoder = folders.kandinsky_decoder(tmp_path / "decoder")
    with pytest.raises(ValueError, match="KandinskyV22Pipeline, which has no image_encoder; give --pretrained_prior"):
        steps.opened(decoder, ("unet",))
    pipe = steps.opened(decoder, ("unet",), sources={"image_encoder": prior})
    theirs = diffusers.KandinskyV22Pipeline.from_pretrained(decoder)
    encoder = diffusers.KandinskyV22PriorPipeline.from_pretrained(prior).image_encoder
    objective = Objective(scheduler=pipe.scheduler, snr_gamma=5.0)
    batch = steps.batch_of(pipe, 16, rng)
    trained, parameters = training.full(pipe, ["unet"]), twin.full_parameters(theirs, ["unet"])
    loss = lambda: steps.decoder_loss(theirs, encoder, objective, batch)
    require_equal(steps.compare(pipe, trained, batch, objective, parameters, loss))


def test_kandinsky_prior(tmp_path: Path, rng: np.random.Generator) -> None:
    pipe = steps.opened(folders.kandinsky_prior(tmp_path), ("prior",))
    theirs = diffusers.KandinskyV22PriorPipeline.from_pretrained(tmp_path)
    objective = Objective(scheduler=pipe.scheduler, snr_gamma=5.0)
    batch = steps.batch_of(pipe, 16, rng)
    trained, parameters = training.full(pipe, ["prior"]), twin.full_parameters(theirs, ["prior"])
    assert not {"clip_mean", "clip_std"} & {*trained.trainable["prior"]}
    parameters = {name: p for name, p in parameters.items() if "clip_" not in name.split(".")[-1]}
    loss = lambda: steps.prior_loss(theirs, objective, batch)
    require_equal(steps.compare(pipe, trained, batch, objective, parameters, loss))
