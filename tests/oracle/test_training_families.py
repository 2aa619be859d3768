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

wuerstchen = pytest.importorskip("tests.oracle.wuerstchen", reason="needs PyTorch diffusers and transformers")
efficientnet = pytest.importorskip("tests.oracle.efficientnet", reason="needs PyTorch")

twin, torch, diffusers = steps.twin, folders.torch, folders.diffusers

ONE_LEVEL = {
    "block_out_channels": (32,),
    "down_block_types": ("SimpleCrossAttnDownBlock2D",),
    "up_block_types": ("SimpleCrossAttnUpBlock2D",),
}
EDGE = 8

LOSS, PARAMETERS = 1e-6, 1e-5
"""Accepted relative differences of the loss, and of the parameters after the step."""


def require_equal(found: tuple[float, float]) -> None:
    assert found[0] < LOSS, f"the loss differs by {found[0]:.1e}"
    assert found[1] < PARAMETERS, f"the parameters differ by {found[1]:.1e}"
    print(f"loss {found[0]:.1e}, parameters {found[1]:.1e}")


def trained_of(pipe: Any, theirs: Any, name: str, *, lora: bool) -> tuple[training.Trained, dict[str, Any]]:
    """What is trained on both sides: the network, or low-rank pairs for it."""
    if not lora:
        return training.full(pipe, [name]), twin.full_parameters(theirs, [name])
    pytest.importorskip("peft", reason="PyTorch diffusers loads LoRA through peft")
    trained = training.low_rank(pipe, [name], rank=3, seed=0)
    return trained, twin.low_rank_parameters(theirs, trained.trainable)


def if_unet(stage: int) -> Any:
    """A UNet of one level, whose norms of the prompt have two channels in each of their 32 groups. With one, as other
    tests have, a bias before them has no effect, and its gradient is rounding."""
    torch.manual_seed(stage)
    config = if_folders.STAGES[stage] | {"cross_attention_dim": 64, "layers_per_block": 1, **ONE_LEVEL}
    return folders.lively(diffusers.UNet2DConditionModel(**config))


def if_step(folder: Path, stage: int, *, lora: bool, prior: bool = False, labels: str | None = None, rng: Any) -> None:
    if_folders.save(folder, stage, unet=if_unet(stage))
    pipe = steps.opened(folder, ("unet",))
    kind = diffusers.IFPipeline if stage == 1 else diffusers.IFSuperResolutionPipeline
    theirs = kind.from_pretrained(folder)
    trained, parameters = trained_of(pipe, theirs, "unet", lora=lora)
    objective = Objective(scheduler=pipe.scheduler, snr_gamma=5.0, prior_loss_weight=0.7)
    batch = steps.batch_of(pipe, EDGE, rng, prior)
    loss = lambda: steps.if_loss(theirs, objective, batch, labels)
    require_equal(steps.compare(pipe, trained, batch, objective, parameters, loss, labels))


def test_if_first_stage(tmp_path: Path, rng: np.random.Generator) -> None:
    """With prior preservation, as in DreamBooth."""
    if_step(tmp_path, 1, lora=False, prior=True, rng=rng)


@pytest.mark.slow
def test_if_first_stage_with_lora(tmp_path: Path, rng: np.random.Generator) -> None:
    if_step(tmp_path, 1, lora=True, rng=rng)


@pytest.mark.slow
@pytest.mark.parametrize("labels", [None, "timesteps"])
def test_if_second_stage(labels: str | None, tmp_path: Path, rng: np.random.Generator) -> None:
    if_step(tmp_path, 2, lora=False, labels=labels, rng=rng)


@pytest.mark.slow
def test_if_second_stage_with_lora(tmp_path: Path, rng: np.random.Generator) -> None:
    if_step(tmp_path, 2, lora=True, rng=rng)


# The ordinary suite has this kind of UNet in the first stage above, and its parts in the tests of the scripts.
@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_kandinsky_decoder(lora: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    prior = folders.kandinsky_prior(tmp_path / "prior")
    decoder = folders.kandinsky_decoder(tmp_path / "decoder", **ONE_LEVEL)
    with pytest.raises(ValueError, match="KandinskyV22Pipeline, which has no image_encoder; give --pretrained_prior"):
        steps.opened(decoder, ("unet",))
    pipe = steps.opened(decoder, ("unet",), sources={"image_encoder": prior})
    theirs = diffusers.KandinskyV22Pipeline.from_pretrained(decoder)
    encoder = diffusers.KandinskyV22PriorPipeline.from_pretrained(prior).image_encoder
    objective = Objective(scheduler=pipe.scheduler, snr_gamma=5.0)
    batch = steps.batch_of(pipe, 16, rng)
    trained, parameters = trained_of(pipe, theirs, "unet", lora=lora)
    loss = lambda: steps.decoder_loss(theirs, encoder, objective, batch)
    require_equal(steps.compare(pipe, trained, batch, objective, parameters, loss))


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kandinsky_prior(lora: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    pipe = steps.opened(folders.kandinsky_prior(tmp_path), ("prior",))
    theirs = diffusers.KandinskyV22PriorPipeline.from_pretrained(tmp_path)
    objective = Objective(scheduler=pipe.scheduler, snr_gamma=5.0)
    batch = steps.batch_of(pipe, 16, rng)
    trained, parameters = trained_of(pipe, theirs, "prior", lora=lora)
    assert not {"clip_mean", "clip_std"} & {*trained.trainable["prior"]}
    parameters = {name: p for name, p in parameters.items() if "clip_" not in name.split(".")[-1]}
    loss = lambda: steps.prior_loss(theirs, objective, batch)
    require_equal(steps.compare(pipe, trained, batch, objective, parameters, loss))


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_wuerstchen_prior(lora: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    theirs, encoder = wuerstchen.prior_pipeline(tmp_path / "prior"), efficientnet.tiny(wuerstchen.PRIOR["c_in"])
    torch.save({"state_dict": {"x": torch.zeros(1)}, "effnet_state_dict": encoder.state_dict()}, tmp_path / "b.pt")
    pipe = steps.opened(tmp_path / "prior", ("prior",), sources={"effnet": tmp_path / "b.pt"})
    objective = Objective(scheduler=pipe.scheduler)
    batch = steps.batch_of(pipe, 64, rng)
    trained, parameters = trained_of(pipe, theirs, "prior", lora=lora)
    loss = lambda: steps.semantic_loss(theirs, encoder, objective, batch)
    require_equal(steps.compare(pipe, trained, batch, objective, parameters, loss))
