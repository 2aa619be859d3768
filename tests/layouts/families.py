"""Whole tiny pipelines of each single-file family, as tensors under diffusers' names."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffuse_jax.models import AutoencoderKL, DPTForDepthEstimation, Model, UNet2DConditionModel
from diffuse_jax.models.bit import BitConfig
from diffuse_jax.models.dpt import DEFAULT_BACKBONE, DPTConfig
from diffuse_jax.text import CLIPTextModel, CLIPTextModelWithProjection
from tests.weights.tiny import CLIP, OPENCLIP, SD1, SD2, VAE, X4, XL, torch_tensors

DEPTH = DPTConfig(
    is_hybrid=True,
    hidden_size=64,
    num_attention_heads=1,
    intermediate_size=96,
    image_size=32,
    reassemble_factors=(1, 1, 1, 0.5),
    neck_hidden_sizes=(128, 128, 24, 32),
    fusion_hidden_size=16,
    backbone_config=BitConfig.from_json(
        {**DEFAULT_BACKBONE, "depths": [1, 2, 1], "embedding_size": 32, "hidden_sizes": [128, 128, 256]}
    ),
)
FAMILIES: dict[str, dict[str, Model]] = {
    "v1": {"unet": UNet2DConditionModel(SD1), "vae": AutoencoderKL(VAE), "text_encoder": CLIPTextModel(CLIP)},
    "v2": {
        "unet": UNet2DConditionModel(SD2),
        "vae": AutoencoderKL(VAE.replace(sample_size=768)),
        "text_encoder": CLIPTextModel(OPENCLIP),
    },
    "v2-depth": {
        "unet": UNet2DConditionModel(SD2.replace(in_channels=5, sample_size=64)),
        "vae": AutoencoderKL(VAE),
        "text_encoder": CLIPTextModel(OPENCLIP),
        "depth_estimator": DPTForDepthEstimation(DEPTH),
    },
    "v2-turbo": {
        "unet": UNet2DConditionModel(SD2.replace(sample_size=64)),
        "vae": AutoencoderKL(VAE),
        "text_encoder": CLIPTextModel(OPENCLIP),
    },
    "x4-upscaler": {
        "unet": UNet2DConditionModel(X4),
        "vae": AutoencoderKL(VAE.replace(sample_size=256, scaling_factor=0.08333)),
        "text_encoder": CLIPTextModel(OPENCLIP),
    },
    "xl": {
        "unet": UNet2DConditionModel(XL),
        "vae": AutoencoderKL(VAE.replace(sample_size=1024, scaling_factor=0.13025)),
        "text_encoder": CLIPTextModel(CLIP),
        "text_encoder_2": CLIPTextModelWithProjection(OPENCLIP.replace(projection_dim=64)),
    },
    "xl-refiner": {
        "unet": UNet2DConditionModel(XL),
        "vae": AutoencoderKL(VAE.replace(sample_size=1024, scaling_factor=0.13025)),
        "text_encoder_2": CLIPTextModelWithProjection(OPENCLIP.replace(projection_dim=64)),
    },
}


def family_tensors(name: str, rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, dict[str, np.ndarray]]:
    """Component name -> PyTorch tensors with random numbers."""
    return {part: torch_tensors(model, rng, dtype) for part, model in FAMILIES[name].items()}
