"""The levels of text-conditioned UNets: downward path, middle block and upward path."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.models.attention import Transformer2D
from diffuse_jax.models.remat import remat_block
from diffuse_jax.models.resnet import Downsample, ResnetBlock, Upsample
from diffuse_jax.models.unet_config import EncoderConfig, Level


def add_residuals(tensors: Sequence[jax.Array], residuals: Sequence[jax.Array], name: str) -> list[jax.Array]:
    """Each ``[B,h,w,C]`` plus its residual, of the same shape or ``[B,1,1,C]``; dtypes do not change.

    Raises:
      ValueError: the number of residuals or a shape is wrong; the message calls the residuals ``name``.
    """
    if len(residuals) != len(tensors):
        raise ValueError(f"{name} must be {len(tensors)} arrays for this network, got {len(residuals)}")
    for i, (x, residual) in enumerate(zip(tensors, residuals)):
        pooled = (x.shape[0], 1, 1, x.shape[-1])
        if residual.shape not in (x.shape, pooled):
            which = f"{name}[{i}]" if len(tensors) > 1 else name
            raise ValueError(f"{which} must be {x.shape} (or pooled, {pooled}), got {residual.shape}")
    return [x + jnp.asarray(residual, x.dtype) for x, residual in zip(tensors, residuals)]


class Block(nn.Module):
    """Base class of the three kinds of block: config, level, and how to build residual blocks and attention."""

    config: EncoderConfig
    level: Level
    downsample: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def resnet(self, i: int, x: jax.Array, temb: jax.Array) -> jax.Array:
        c = self.config
        return remat_block(ResnetBlock, self.remat)(
            self.level.channels,
            c.groups,
            c.norm_eps,
            c.act_fn,
            c.resnet_time_scale_shift,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=f"resnets_{i}",
        )(x, temb)

    def attend(self, i: int, x: jax.Array, context: jax.Array) -> jax.Array:
        if not self.level.depths:
            return x
        return Transformer2D(
            self.level.heads,
            self.level.depths[i],
            self.config.groups,
            self.config.use_linear_projection,
            self.level.only_cross_attention,
            self.remat,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=f"attentions_{i}",
        )(x, context)


class DownBlock(Block):
    """One level of the downward path; returns its output and its skip connections.

    ``residual``, of an adapter, is added before the downsampling in a level with attention and after it in one without,
    as published adapters were trained; the skip connection from there has it too.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, temb: jax.Array, context: jax.Array, residual: jax.Array | None = None
    ) -> tuple[jax.Array, list[jax.Array]]:
        skips = []
        for i in range(self.level.layers):
            x = self.attend(i, self.resnet(i, x, temb), context)
            skips.append(x)
        if self.level.depths:
            skips[-1] = x = self.added(x, residual)
        if self.downsample:
            x = Downsample(
                self.level.channels,
                self.config.downsample_padding,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="downsamplers_0",
            )(x)
            skips.append(x)
        if not self.level.depths:
            skips[-1] = x = self.added(x, residual)
        return x, skips

    def added(self, x: jax.Array, residual: jax.Array | None) -> jax.Array:
        return x if residual is None else add_residuals([x], [residual], f"the adapter's residual of {self.name}")[0]


class MidBlock(Block):
    """Residual block, attention, residual block at the coarsest level; without attention, a single residual block."""

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array, context: jax.Array) -> jax.Array:
        x = self.resnet(0, x, temb)
        return self.resnet(1, self.attend(0, x, context), temb) if self.level.depths else x


class Join(nn.Module):
    """Concatenate features and a skip connection; a layer so that adapters can intercept both (intercept.py)."""

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        """``[B,h,w,C]`` and ``[B,h,w,D]`` -> ``[B,h,w,C+D]``."""
        return jnp.concatenate([x, skip], -1)


class UpBlock(Block):
    """One level of the upward path: each residual block takes one skip connection; then upsampling to ``size``."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        skips: list[jax.Array],
        temb: jax.Array,
        context: jax.Array,
        size: tuple[int, int] | None,
    ) -> jax.Array:
        for i in range(self.level.layers):
            joined = Join(name=f"joins_{i}")(x, skips[-1 - i])
            x = self.attend(i, self.resnet(i, joined, temb), context)
        if size is None:
            return x
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Upsample(self.level.channels, **dtypes, name="upsamplers_0")(x, size)
