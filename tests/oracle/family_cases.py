"""One training step of each new network of DeepFloyd IF, Kandinsky 2.2 and Würstchen, here and with PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax.torch_backend import training
from diffuse_jax.training.objective import Objective
from tests.train.latent_models import SIZE, save_inpainting

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


def deepfloyd_if(
    folder: Path,
    rng: np.random.Generator,
    stage: int,
    *,
    lora: bool = False,
    prior: bool = False,
    labels: Any = None,
    masked: bool = False,
) -> Any:
    """A stage; ``prior`` is prior preservation, as in DreamBooth."""
    if_folders.save(folder, stage, unet=if_unet(stage))
    pipe = steps.opened(folder, ("unet",))
    kind = diffusers.IFPipeline if stage == 1 else diffusers.IFSuperResolutionPipeline
    theirs = kind.from_pretrained(folder)
    trained, parameters = trained_of(pipe, theirs, "unet", lora=lora)
    objective = Objective(scheduler=pipe.scheduler, snr_gamma=5.0, prior_loss_weight=0.7)
    batch = steps.batch_of(pipe, EDGE, rng, prior, masked)
    loss = lambda: steps.if_loss(theirs, objective, batch, labels)
    return steps.compare(pipe, trained, batch, objective, parameters, loss, labels)


def inpainting(folder: Path, rng: np.random.Generator, *, lora: bool = False) -> Any:
    """A Stable Diffusion for inpainting; with prior preservation and masks of the loss."""
    pipe = steps.opened(save_inpainting(folder, fresh=False), ("unet",))
    theirs = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder)
    objective = Objective(scheduler=pipe.scheduler, snr_gamma=5.0, prior_loss_weight=0.7)
    batch = steps.batch_of(pipe, SIZE, rng, prior=True, masked=True)
    trained, parameters = trained_of(pipe, theirs, "unet", lora=lora)
    return steps.compare(
        pipe, trained, batch, objective, parameters, lambda: steps.inpainting_loss(theirs, objective, batch)
    )


def kandinsky_decoder(folder: Path, rng: np.random.Generator, *, lora: bool = False, few: bool = False) -> Any:
    """With the image encoder of a prior; ``few`` is prior preservation with masks, as in DreamBooth."""
    prior = folders.kandinsky_prior(folder / "prior")
    decoder = folders.kandinsky_decoder(folder / "decoder", **ONE_LEVEL)
    pipe = steps.opened(decoder, ("unet",), sources={"image_encoder": prior})
    theirs = diffusers.KandinskyV22Pipeline.from_pretrained(decoder)
    encoder = diffusers.KandinskyV22PriorPipeline.from_pretrained(prior).image_encoder
    objective = Objective(scheduler=pipe.scheduler, snr_gamma=5.0, prior_loss_weight=0.7)
    batch = steps.batch_of(pipe, 16, rng, few, few)
    trained, parameters = trained_of(pipe, theirs, "unet", lora=lora)
    loss = lambda: steps.decoder_loss(theirs, encoder, objective, batch)
    return steps.compare(pipe, trained, batch, objective, parameters, loss)


def kandinsky_prior(folder: Path, rng: np.random.Generator, *, lora: bool = False, few: bool = False) -> Any:
    """The statistics of embeddings are not trained."""
    pipe = steps.opened(folders.kandinsky_prior(folder), ("prior",))
    theirs = diffusers.KandinskyV22PriorPipeline.from_pretrained(folder)
    objective = Objective(scheduler=pipe.scheduler, snr_gamma=5.0, prior_loss_weight=0.7)
    batch = steps.batch_of(pipe, 16, rng, few)
    trained, parameters = trained_of(pipe, theirs, "prior", lora=lora)
    assert not {"clip_mean", "clip_std"} & {*trained.trainable["prior"]}
    parameters = {name: p for name, p in parameters.items() if "clip_" not in name.split(".")[-1]}
    loss = lambda: steps.prior_loss(theirs, objective, batch)
    return steps.compare(pipe, trained, batch, objective, parameters, loss)


def wuerstchen_prior(folder: Path, rng: np.random.Generator, *, lora: bool = False, masked: bool = False) -> Any:
    """With an encoder of semantic maps from a file of another program; ``masked``: with masks of the loss."""
    theirs, encoder = wuerstchen.prior_pipeline(folder / "prior"), efficientnet.tiny(wuerstchen.PRIOR["c_in"])
    torch.save({"state_dict": {"x": torch.zeros(1)}, "effnet_state_dict": encoder.state_dict()}, folder / "b.pt")
    pipe = steps.opened(folder / "prior", ("prior",), sources={"effnet": folder / "b.pt"})
    objective = Objective(scheduler=pipe.scheduler)
    batch = steps.batch_of(pipe, 64, rng, masked=masked)
    trained, parameters = trained_of(pipe, theirs, "prior", lora=lora)
    loss = lambda: steps.semantic_loss(theirs, encoder, objective, batch)
    return steps.compare(pipe, trained, batch, objective, parameters, loss)


CASES: dict[str, Callable[[Path, np.random.Generator], Any]] = {
    "DeepFloyd IF I, DreamBooth": functools.partial(deepfloyd_if, stage=1, prior=True),
    "DeepFloyd IF I, masks": functools.partial(deepfloyd_if, stage=1, masked=True),
    "DeepFloyd IF I, LoRA": functools.partial(deepfloyd_if, stage=1, lora=True),
    "DeepFloyd IF II": functools.partial(deepfloyd_if, stage=2),
    "DeepFloyd IF II, labels of the script": functools.partial(deepfloyd_if, stage=2, labels="timesteps"),
    "DeepFloyd IF II, LoRA": functools.partial(deepfloyd_if, stage=2, lora=True),
    "Inpainting, DreamBooth and masks": inpainting,
    "Inpainting, LoRA": functools.partial(inpainting, lora=True),
    "Kandinsky 2.2 decoder": kandinsky_decoder,
    "Kandinsky 2.2 decoder, LoRA": functools.partial(kandinsky_decoder, lora=True),
    "Kandinsky 2.2 decoder, DreamBooth and masks": functools.partial(kandinsky_decoder, few=True),
    "Kandinsky 2.2 prior": kandinsky_prior,
    "Kandinsky 2.2 prior, DreamBooth": functools.partial(kandinsky_prior, few=True),
    "Kandinsky 2.2 prior, LoRA": functools.partial(kandinsky_prior, lora=True),
    "Würstchen prior": wuerstchen_prior,
    "Würstchen prior, masks": functools.partial(wuerstchen_prior, masked=True),
    "Würstchen prior, LoRA": functools.partial(wuerstchen_prior, lora=True),
}
"""One training step of each, by its name in the documentation."""
