"""Families: how each kind of checkpoint is conditioned."""

from diffuse_jax.pipelines.families.clip import ClipFamily
from diffuse_jax.pipelines.families.deepfloyd_if import DEEPFLOYD_IF
from diffuse_jax.pipelines.families.image_variation import IMAGE_VARIATION
from diffuse_jax.pipelines.families.latent_diffusion import LATENT_DIFFUSION
from diffuse_jax.pipelines.families.latent_upscaler import LATENT_UPSCALER
from diffuse_jax.pipelines.families.stable_diffusion import STABLE_DIFFUSION
from diffuse_jax.pipelines.families.stable_diffusion_xl import STABLE_DIFFUSION_XL, STABLE_DIFFUSION_XL_FROM_IMAGE
from diffuse_jax.pipelines.families.wuerstchen import WUERSTCHEN_DECODER, WUERSTCHEN_PRIOR

__all__ = [
    "DEEPFLOYD_IF",
    "IMAGE_VARIATION",
    "LATENT_DIFFUSION",
    "LATENT_UPSCALER",
    "STABLE_DIFFUSION",
    "STABLE_DIFFUSION_XL",
    "STABLE_DIFFUSION_XL_FROM_IMAGE",
    "WUERSTCHEN_DECODER",
    "WUERSTCHEN_PRIOR",
    "ClipFamily",
]
