"""The levels that the variational autoencoders are built of: encoder, decoder, and the attention between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.models.attention import SpatialAttention
from diffuse_jax.models.layers import Conv, GroupNorm
from diffuse_jax.models.remat import remat_block, remat_level
from diffuse_jax.models.resnet import Downsample, ResnetBlock, Upsample

EPS = 1e-6


class Stage(nn.Module):
    """Base class of encoder, decoder and their levels: a config, two dtypes and a remat policy."""

    config: Any  # an AutoencoderKLConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: str = "none"

    @property
    def dtypes(self) -> Mapping[str, DTypeLike]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def resnet(self, channels: int, name: str) -> ResnetBlock:
        c = self.config
        block = remat_block(ResnetBlock, self.remat)
        return block(channels, c.norm_num_groups, EPS, c.act_fn, **self.dtypes, name=name)

    def finish(self, x: jax.Array, channels: int) -> jax.Array:
        """The last layers; their activation is always SiLU, since ``act_fn`` is for the residual blocks only."""
        x = GroupNorm(self.config.norm_num_groups, EPS, **self.dtypes, name="conv_norm_out")(x)
        return Conv(channels, **self.dtypes, name="conv_out")(nn.silu(x))


class Level(Stage):
    """``layers`` residual blocks, then ``resample``: "down", "up" or None."""

    channels: int = 0
    layers: int = 1
    resample: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = self.resnet(self.channels, f"resnets_{i}")(x)
        if self.resample == "down":
            return Downsample(self.channels, padding=0, **self.dtypes, name="downsamplers_0")(x)
        if self.resample == "up":
            return Upsample(self.channels, **self.dtypes, name="upsamplers_0")(x)
        return x


class Middle(Stage):
    """Residual block, one-head attention over all pixels, residual block."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        C = x.shape[-1]
        x = self.resnet(C, "resnets_0")(x)
        if self.config.mid_block_add_attention:
            attention = remat_block(SpatialAttention, self.remat)
            x = x + attention(1, self.config.norm_num_groups, EPS, **self.dtypes, name="attentions_0")(x)
        return self.resnet(C, "resnets_1")(x)


class Encoder(Stage):
    """Pixels to the posterior's mean and log variance, concatenated."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = Conv(c.block_out_channels[0], **self.dtypes, name="conv_in")(x)
        for i, channels in enumerate(c.block_out_channels):
            resample = "down" if i + 1 < len(c.block_out_channels) else None
            level = remat_level(Level, self.remat)(
                c,
                channels=channels,
                layers=c.layers_per_block,
                resample=resample,
                **self.dtypes,
                remat=self.remat,
                name=f"down_blocks_{i}",
            )
            x = level(x)
        x = remat_level(Middle, self.remat)(c, **self.dtypes, remat=self.remat, name="mid_block")(x)
        return self.finish(x, 2 * c.latent_channels)


class Decoder(Stage):
    """Latents to pixels; each level has one residual block more than the encoder's.

    ``blend`` is applied before each level and after the last one.
    """

    @nn.compact
    def __call__(self, x: jax.Array, blend: Callable[[jax.Array], jax.Array] = lambda x: x) -> jax.Array:
        c = self.config
        x = Conv(c.block_out_channels[-1], **self.dtypes, name="conv_in")(x)
        x = remat_level(Middle, self.remat)(c, **self.dtypes, remat=self.remat, name="mid_block")(x)
        for i, channels in enumerate(c.block_out_channels[::-1]):
            resample = "up" if i + 1 < len(c.block_out_channels) else None
            level = remat_level(Level, self.remat)(
                c,
                channels=channels,
                layers=c.layers_per_block + 1,
                resample=resample,
                **self.dtypes,
                remat=self.remat,
                name=f"up_blocks_{i}",
            )
            x = level(blend(x))
        return self.finish(blend(x), c.out_channels)
