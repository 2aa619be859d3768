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
from diffuse_jax.models.resnet import Downsample, ResnetBlock, SpatialNorm, Upsample

EPS = 1e-6

WITH_ATTENTION = ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D")
"""Types of levels that have attention after each residual block."""


class Stage(nn.Module):
    """Base class of encoder, decoder and their levels: a config, two dtypes and a remat policy."""

    config: Any  # an AutoencoderKLConfig or a VQConfig
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

    def attend(self, x: jax.Array, name: str, codes: jax.Array | None = None) -> jax.Array:
        """One-head attention over all pixels, with its residual."""
        if codes is not None:
            return x + remat_block(SpatiallyNormed, self.remat)(**self.dtypes, name=name)(x, codes)
        attention = remat_block(SpatialAttention, self.remat)
        return x + attention(1, self.config.norm_num_groups, EPS, **self.dtypes, name=name)(x)

    def finish(self, x: jax.Array, channels: int, codes: jax.Array | None = None) -> jax.Array:
        """The last layers; their activation is always SiLU, since ``act_fn`` is for the residual blocks only."""
        if codes is None:
            x = GroupNorm(self.config.norm_num_groups, EPS, **self.dtypes, name="conv_norm_out")(x)
        else:
            x = SpatialNorm(**self.dtypes, name="conv_norm_out")(x, codes)
        return Conv(channels, **self.dtypes, name="conv_out")(nn.silu(x))


class SpatiallyNormed(nn.Module):
    """Attention after a :class:`SpatialNorm`, ``x [B,H,W,C]`` and latents ``[B,h,w,c]`` -> ``[B,H,W,C]``."""

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, codes: jax.Array) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attend = SpatialAttention(1, None, EPS, **dtypes, name=None)
        nn.share_scope(self, attend)
        return attend(SpatialNorm(**dtypes, name="spatial_norm")(x, codes))


class Level(Stage):
    """``layers`` residual blocks, with ``attention`` after each, then ``resample``: "down", "up" or None."""

    channels: int = 0
    layers: int = 1
    resample: str | None = None
    attention: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, codes: jax.Array | None = None) -> jax.Array:
        for i in range(self.layers):
            x = self.resnet(self.channels, f"resnets_{i}")(x, None, codes)
            x = self.attend(x, f"attentions_{i}", codes) if self.attention else x
        if self.resample == "down":
            return Downsample(self.channels, padding=0, **self.dtypes, name="downsamplers_0")(x)
        if self.resample == "up":
            return Upsample(self.channels, **self.dtypes, name="upsamplers_0")(x)
        return x


class Middle(Stage):
    """Residual block, one-head attention over all pixels, residual block."""

    @nn.compact
    def __call__(self, x: jax.Array, codes: jax.Array | None = None) -> jax.Array:
        C = x.shape[-1]
        x = self.resnet(C, "resnets_0")(x, None, codes)
        if self.config.mid_block_add_attention:
            x = self.attend(x, "attentions_0", codes)
        return self.resnet(C, "resnets_1")(x, None, codes)


class Encoder(Stage):
    """Pixels to what the config's ``encoded_channels`` are: latents, or a posterior's mean and log variance."""

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
                attention=c.down_block_types[i] in WITH_ATTENTION,
                **self.dtypes,
                remat=self.remat,
                name=f"down_blocks_{i}",
            )
            x = level(x)
        x = remat_level(Middle, self.remat)(c, **self.dtypes, remat=self.remat, name="mid_block")(x)
        return self.finish(x, c.encoded_channels)


class Decoder(Stage):
    """Latents to pixels; each level has one residual block more than the encoder's.

    ``blend`` is applied before each level and after the last one. With ``codes [B,h,w,c]``, the latents before their
    projection, every norm is a :class:`~diffuse_jax.models.resnet.SpatialNorm` (MoVQ).
    """

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        blend: Callable[[jax.Array], jax.Array] = lambda x: x,
        codes: jax.Array | None = None,
    ) -> jax.Array:
        c = self.config
        x = Conv(c.block_out_channels[-1], **self.dtypes, name="conv_in")(x)
        x = remat_level(Middle, self.remat)(c, **self.dtypes, remat=self.remat, name="mid_block")(x, codes)
        for i, channels in enumerate(c.block_out_channels[::-1]):
            resample = "up" if i + 1 < len(c.block_out_channels) else None
            level = remat_level(Level, self.remat)(
                c,
                channels=channels,
                layers=c.layers_per_block + 1,
                resample=resample,
                attention=c.up_block_types[i] in WITH_ATTENTION,
                **self.dtypes,
                remat=self.remat,
                name=f"up_blocks_{i}",
            )
            x = level(blend(x), codes)
        return self.finish(blend(x), c.out_channels, codes)
