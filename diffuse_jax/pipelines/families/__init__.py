"""Families: how each kind of checkpoint is conditioned."""

from diffuse_jax.pipelines.families.clip import ClipFamily
from diffuse_jax.pipelines.families.stable_diffusion import STABLE_DIFFUSION
from diffuse_jax.pipelines.families.stable_diffusion_xl import STABLE_DIFFUSION_XL

__all__ = ["STABLE_DIFFUSION", "STABLE_DIFFUSION_XL", "ClipFamily"]
