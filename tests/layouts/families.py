"""Whole tiny pipelines of each single-file family, as tensors under diffusers' names."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffuse_jax.models import AutoencoderKL, Model, UNet2DConditionModel
from diffuse_jax.text import CLIPTextModel, CLIPTextModelWithProjection
from tests.weights.tiny import CLIP, OPENCLIP, SD1, SD2, VAE, X4, XL, torch_tensors

FAMILIES: dict[str, dict[str, Model]] = {
    "v1": {"unet": UNet2DConditionModel(SD1), "vae": AutoencoderKL(VAE), "text_encoder": CLIPTextModel(CLIP)},
    "v2": {
        "unet": UNet2DConditionModel(SD2),
        "vae": AutoencoderKL(VAE.replace(sample_size=768)),
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
    """Component name -> PyTorch tensors with random values."""
    return {part: torch_tensors(model, rng, dtype) for part, model in FAMILIES[name].items()}
