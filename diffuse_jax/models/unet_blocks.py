"""The levels of text-conditioned UNets: downward path, middle block and upward path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.models.attention import Transformer2D
from diffuse_jax.models.joint_attention import JointAttention
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

    def resnet(self, name: str, x: jax.Array, temb: jax.Array, resample: str | None = None) -> jax.Array:
        c, joint = self.config, self.level.joint
        return remat_block(ResnetBlock, self.remat)(
            self.level.channels,
            c.groups,
            c.norm_eps,
            c.act_fn,
            c.resnet_time_scale_shift,
            resample,
            not (joint and c.resnet_skip_time_act),
            self.output_scale,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )(x, temb)

    @property
    def output_scale(self) -> float:
        """What the sums of residual blocks are divided by."""
        return self.config.resnet_out_scale_factor if self.level.joint else 1.0

    def attend(self, i: int, x: jax.Array, context: jax.Array) -> jax.Array:
        level, c = self.level, self.config
        if not level.depths:
            return x
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "name": f"attentions_{i}"}
        if level.joint:
            attention = remat_block(JointAttention, self.remat)
            return attention(level.heads, c.groups, level.only_cross_attention, c.cross_attention_norm, **options)(
                x, context
            )
        return Transformer2D(
            level.heads,
            level.depths[i],
            c.groups,
            c.use_linear_projection,
            level.only_cross_attention,
            self.remat,
            **options,
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
            x = self.attend(i, self.resnet(f"resnets_{i}", x, temb), context)
            skips.append(x)
        if self.level.depths:
            skips[-1] = x = self.added(x, residual)
        if self.downsample:
            x = self.coarser(x, temb)
            skips.append(x)
        if not self.level.depths:
            skips[-1] = x = self.added(x, residual)
        return x, skips

    def coarser(self, x: jax.Array, temb: jax.Array) -> jax.Array:
        if self.level.joint:
            return self.resnet("downsamplers_0", x, temb, "down")
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        padding = self.config.downsample_padding
        return Downsample(self.level.channels, padding, **dtypes, name="downsamplers_0")(x)

    def added(self, x: jax.Array, residual: jax.Array | None) -> jax.Array:
        return x if residual is None else add_residuals([x], [residual], f"the adapter's residual of {self.name}")[0]


class MidBlock(Block):
    """Residual block, attention, residual block at the coarsest level; without attention, a single residual block."""

    @property
    def output_scale(self) -> float:
        return self.config.mid_block_scale_factor

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array, context: jax.Array) -> jax.Array:
        x = self.resnet("resnets_0", x, temb)
        return self.resnet("resnets_1", self.attend(0, x, context), temb) if self.level.depths else x


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
            x = self.attend(i, self.resnet(f"resnets_{i}", joined, temb), context)
        if size is None:
            return x
        if self.level.joint:
            return self.resnet("upsamplers_0", x, temb, "up")
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Upsample(self.level.channels, **dtypes, name="upsamplers_0")(x, size)
