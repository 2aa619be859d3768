"""Networks as Flax Linen modules: pure functions of a parameter dict, channel-last."""

from diffuse_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from diffuse_jax.models.base import Model, Params
from diffuse_jax.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "Model",
    "Params",
    "UNet2DConditionConfig",
    "UNet2DConditionModel",
]
