"""Tiny Stable Diffusions (1.x and XL) in folders, for tests of training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from diffuse_jax import DiffusionPipeline
from diffuse_jax.models import AutoencoderKL, AutoencoderKLConfig, UNet2DConditionConfig, UNet2DConditionModel
from diffuse_jax.pipelines import StableDiffusionInpaintPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffuse_jax.schedulers import DDIMScheduler
from diffuse_jax.text import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from diffuse_jax.training.initial import initial_params
from tests.pipelines import tiny

SIZE = 16
VAE = AutoencoderKLConfig(
    block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=2, latent_channels=4, layers_per_block=1, sample_size=SIZE, mid_block_add_attention=False,
    scaling_factor=1.0,
)  # fmt: skip
UNET = UNet2DConditionConfig(
    sample_size=SIZE // 2, block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",), layers_per_block=1, norm_num_groups=2, cross_attention_dim=16,
    num_attention_heads=2, mid_block_type=None,
)  # fmt: skip
MIDDLE = "UNetMidBlock2DCrossAttn"
"""The middle block of UNets that ControlNets are made for."""
XL_UNET = dataclasses.replace(
    UNET, cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 * 4 + 16, use_linear_projection=True,
)  # fmt: skip
LEVELS: dict[str, Any] = {
    "block_out_channels": (16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "num_attention_heads": (2, 2),
}
"""Two levels in place of one, for what halves and doubles the size."""


def networks(
    unet: UNet2DConditionConfig,
    encoders: dict[str, type[CLIPTextModel]],
    fresh: bool,
    vae: AutoencoderKLConfig = VAE,
) -> dict[str, Any]:
    """Networks with random weights; ``fresh``: those from which a real training would start."""
    words = len(tiny.tokenizer())
    text = CLIPTextConfig(
        vocab_size=words, hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=words - 2, eos_token_id=words - 1,
    )  # fmt: skip
    models: dict[str, Any] = {"unet": UNet2DConditionModel(unet), "vae": AutoencoderKL(vae)}
    models |= {name: kind(text) for name, kind in encoders.items()}
    zero = {"unet": (r"^conv_out/kernel$",)} if fresh else {}
    params = {name: initial_params(model.shapes(), 0, zero.get(name, ())) for name, model in models.items()}
    # Like a trained autoencoder, a random one must describe its input with hardly any noise, or nothing can be learned.
    params["vae"]["quant_conv"]["bias"][vae.latent_channels :] = -12.0
    params["vae"]["quant_conv"]["kernel"][..., vae.latent_channels :] = 0.0
    return {name: (model, params[name]) for name, model in models.items()}


def save_sd(
    folder: Path,
    *,
    fresh: bool = True,
    middle: str | None = None,
    unet: UNet2DConditionConfig = UNET,
    vae: AutoencoderKLConfig = VAE,
) -> Path:
    """The folder of a Stable Diffusion."""
    pairs = networks(unet.replace(mid_block_type=middle), {"text_encoder": CLIPTextModel}, fresh, vae)
    return saved(folder, StableDiffusionPipeline, pairs, {"tokenizer": tiny.tokenizer()})


def save_inpainting(folder: Path, *, fresh: bool = True) -> Path:
    """The folder of a Stable Diffusion for inpainting."""
    unet = UNET.replace(in_channels=2 * VAE.latent_channels + 1)
    pairs = networks(unet, {"text_encoder": CLIPTextModel}, fresh)
    return saved(folder, StableDiffusionInpaintPipeline, pairs, {"tokenizer": tiny.tokenizer()})


def save_sdxl(
    folder: Path, *, fresh: bool = True, middle: str | None = None, unet: UNet2DConditionConfig = XL_UNET
) -> Path:
    """The folder of a Stable Diffusion XL."""
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    pairs = networks(unet.replace(mid_block_type=middle), encoders, fresh)
    words = {name: tiny.tokenizer() for name in ("tokenizer", "tokenizer_2")}
    return saved(folder, StableDiffusionXLPipeline, pairs, words)


def saved(folder: Path, kind: type[DiffusionPipeline], pairs: dict[str, Any], parts: dict[str, Any]) -> Path:
    models, params = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
    kind({**models, **parts, "scheduler": scheduler}, params).save_pretrained(folder)
    return folder
