"""The patch discriminator, which tells images from reconstructions (PatchGAN; Isola et al. 2017, section 3.2)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffuse_jax.allowed import Range
from diffuse_jax.config import Config
from diffuse_jax.models.base import Model
from diffuse_jax.models.layers import Conv, GroupNorm

SLOPE = 0.2
EPS = 1e-5
WIDEST = 8
"""Channels of the widest layer, as a multiple of those of the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchDiscriminatorConfig(Config):
    """``layers`` convolutions halve the resolution; widths double from ``channels``, up to ``WIDEST`` times it."""

    class_name: ClassVar[str] = "PatchDiscriminator"

    in_channels: int = 3
    channels: int = 64
    layers: Annotated[int, Range(1, 16)] = 3
    norm_num_groups: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1 or self.channels < 1:
            raise ValueError(f"PatchDiscriminator: layers={self.layers} and channels={self.channels} must be positive")
        if 2 * self.channels % self.norm_num_groups:
            raise ValueError(
                f"PatchDiscriminator: twice channels={self.channels} must be a multiple of "
                f"norm_num_groups={self.norm_num_groups}"
            )

    @property
    def min_size(self) -> int:
        """Edge length of the smallest image, which yields a single logit."""
        return 3 * 2**self.layers


class PatchDiscriminator(Model):
    """One logit per patch, large if the patch looks real; with 3 layers a patch is 70 pixels wide.

    Layers have the same indices in ``main`` as in PyTorch's ``NLayerDiscriminator``. Group norm (Wu and He 2018)
    replaces its batch norm: it keeps no running statistics, and the logits of an image do not depend on which images
    share its batch or its device.
    """

    config: PatchDiscriminatorConfig = PatchDiscriminatorConfig()
    config_class: ClassVar[type[Config]] = PatchDiscriminatorConfig

    def example_inputs(self) -> dict[str, Any]:
        size = self.config.min_size
        return {"images": jax.ShapeDtypeStruct((1, size, size, self.config.in_channels), jnp.float32)}

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """``images [B,H,W,3]`` in [-1, 1] -> logits ``[B,H/2^layers - 2,W/2^layers - 2,1]`` in ``dtype``.

        Raises:
          ValueError: the images are smaller than ``config.min_size``, or have the wrong number of channels.
        """
        c = self.config
        if images.ndim != 4 or images.shape[-1] != c.in_channels or min(images.shape[1:3]) < c.min_size:
            raise ValueError(
                f"images must be [B,H,W,{c.in_channels}] with edges of at least {c.min_size}, got {images.shape}"
            )
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        activate = lambda x: nn.leaky_relu(x, SLOPE)
        x = activate(Conv(c.channels, kernel_size=4, stride=2, **dtypes, name="main_0")(images))
        for i in range(1, c.layers + 1):
            width, stride = c.channels * min(2**i, WIDEST), 2 if i < c.layers else 1
            x = Conv(width, kernel_size=4, stride=stride, **dtypes, name=f"main_{3 * i - 1}")(x)
            x = activate(GroupNorm(c.norm_num_groups, EPS, **dtypes, name=f"main_{3 * i}")(x))
        return Conv(1, kernel_size=4, **dtypes, name=f"main_{3 * c.layers + 2}")(x)
