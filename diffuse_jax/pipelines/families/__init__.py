"""Families: how each kind of checkpoint is conditioned."""

from diffuse_jax.pipelines.families.clip import ClipFamily
from diffuse_jax.pipelines.families.deepfloyd_if import DEEPFLOYD_IF
from diffuse_jax.pipelines.families.image_variation import IMAGE_VARIATION
from diffuse_jax.pipelines.families.latent_upscaler import LATENT_UPSCALER
from diffuse_jax.pipelines.families.stable_diffusion import STABLE_DIFFUSION
from diffuse_jax.pipelines.families.stable_diffusion_xl import STABLE_DIFFUSION_XL, STABLE_DIFFUSION_XL_FROM_IMAGE

__all__ = [
    "DEEPFLOYD_IF",
    "IMAGE_VARIATION",
    "LATENT_UPSCALER",
    "STABLE_DIFFUSION",
    "STABLE_DIFFUSION_XL",
    "STABLE_DIFFUSION_XL_FROM_IMAGE",
    "ClipFamily",
]
