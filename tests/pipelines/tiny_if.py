"""A tiny DeepFloyd IF in memory: both stages and Stability's x4 upscaler, with random weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import transformers

from diffuse_jax.models import UNet2DConditionModel
from diffuse_jax.models.presets import IF_I_M_UNET, IF_II_M_UNET
from diffuse_jax.pipelines import (
    IFPipeline,
    IFSuperResolutionPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
)
from diffuse_jax.schedulers import DDPMScheduler
from diffuse_jax.text import T5Config, T5EncoderModel
from tests.models.filling import random_params

SHARED: dict[str, Any] = {
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "down_block_types": ("SimpleCrossAttnDownBlock2D",),
    "up_block_types": ("SimpleCrossAttnUpBlock2D",),
    "num_attention_heads": 8,
    "norm_num_groups": 4,
    "cross_attention_dim": 32,
    "encoder_hid_dim": 24,
    "addition_embed_type_num_heads": 4,
}
"""Of both UNets."""

NOISE: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}
SAMPLER = NOISE | {"variance_type": "learned_range", "thresholding": True, "dynamic_thresholding_ratio": 0.95}


class Cascade(NamedTuple):
    """The three stages, in their order."""

    first: IFPipeline
    second: IFSuperResolutionPipeline
    third: StableDiffusionUpscalePipeline


def tokenizer() -> transformers.T5Tokenizer:
    """A T5 tokenizer of small letters."""
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0)]
    letters = [(chr(c), -5.0) for c in range(97, 123)]
    return transformers.T5Tokenizer(vocab=[*marks, *letters], extra_ids=0, model_max_length=77)


def cascade(base: StableDiffusionPipeline, sizes: tuple[int, int] = (16, 32)) -> Cascade:
    """The three stages.

    Args:
      base: what the third one shares its text encoder and autoencoder with.
      sizes: of the first two stages' images in pixels.
    """
    rng, words = np.random.default_rng(0), tokenizer()
    config = T5Config(vocab_size=len(words), d_model=24, d_kv=6, d_ff=32, num_layers=1, num_heads=3)
    first, second = (
        UNet2DConditionModel(preset.replace(sample_size=size, **SHARED | changes))
        for preset, size, changes in zip((IF_I_M_UNET, IF_II_M_UNET), sizes, ({}, {"time_embedding_dim": None}))
    )
    third = UNet2DConditionModel(base.components["unet"].config.replace(in_channels=7, num_class_embeds=1000))
    params = lambda model: random_params(model.shapes(), rng)
    shared = {"tokenizer": words, "text_encoder": T5EncoderModel(config), "scheduler": DDPMScheduler(**SAMPLER)}
    trees = {"text_encoder": params(shared["text_encoder"])}
    noiser = {"image_noising_scheduler": DDPMScheduler(**NOISE)}
    return Cascade(
        IFPipeline(shared | {"unet": first}, trees | {"unet": params(first)}),
        IFSuperResolutionPipeline(shared | noiser | {"unet": second}, trees | {"unet": params(second)}),
        StableDiffusionUpscalePipeline.from_pipe(base, unet=(third, params(third)), low_res_scheduler=DDPMScheduler()),
    )
