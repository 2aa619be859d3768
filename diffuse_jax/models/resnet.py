"""Residual convolution blocks and the layers that change resolution."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.models.layers import ACTIVATIONS, Conv, Dense, GroupNorm


class ResnetBlock(nn.Module):
    """Norm, activation, convolution, twice, with the time embedding in between and a shortcut around.

    ``time_scale_shift``: "default" adds the projected time embedding after the first convolution (Ho et al. 2020);
    "scale_shift" lets it scale and shift the second norm (Dhariwal & Nichol 2021, adaptive group norm).
    """

    channels: int
    groups: int = 32
    eps: float = 1e-5
    act_fn: str = "silu"
    time_scale_shift: str = "default"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
        """``x [B,H,W,C]``, ``temb [B,D]`` (none in an autoencoder) -> ``[B,H,W,channels]``."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        act = ACTIVATIONS[self.act_fn]
        shift = scale = None
        if temb is not None:
            width = self.channels * (2 if self.time_scale_shift == "scale_shift" else 1)
            shift = Dense(width, **dtypes, name="time_emb_proj")(act(temb))[:, None, None, :]
            if self.time_scale_shift == "scale_shift":
                scale, shift = jnp.split(shift, 2, axis=-1)

        h = act(GroupNorm(self.groups, self.eps, **dtypes, name="norm1")(x))
        h = Conv(self.channels, **dtypes, name="conv1")(h)
        if shift is not None and scale is None:
            h = h + shift
        h = GroupNorm(self.groups, self.eps, **dtypes, name="norm2")(h)
        if shift is not None and scale is not None:
            h = h * (1 + scale) + shift
        h = Conv(self.channels, **dtypes, name="conv2")(act(h))
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, kernel_size=1, padding=0, **dtypes, name="conv_shortcut")(x)
        return x + h


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution; padding 0 means one zero row below and one column to the right."""

    channels: int
    padding: int = 1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pads = ((0, 1), (0, 1)) if self.padding == 0 else self.padding
        return Conv(self.channels, stride=2, padding=pads, dtype=self.dtype, param_dtype=self.param_dtype, name="conv")(
            x
        )


class Upsample(nn.Module):
    """Nearest-neighbour enlargement, by two or to a given ``(H, W)``, then a convolution."""

    channels: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        x = nearest(x, size or (2 * x.shape[1], 2 * x.shape[2]))
        return Conv(self.channels, dtype=self.dtype, param_dtype=self.param_dtype, name="conv")(x)


def nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Enlarge ``[B,H,W,C]`` to ``[B,*size,C]``; pixel ``i`` of ``n`` reads source pixel ``floor(i * H / n)``."""
    B, H, W, C = x.shape
    if size == (2 * H, 2 * W):  # a broadcast, which XLA fuses; the gather below it does not
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (B, H, 2, W, 2, C))
        return x.reshape(B, 2 * H, 2 * W, C)
    rows = jnp.arange(size[0]) * H // size[0]
    columns = jnp.arange(size[1]) * W // size[1]
    return x[:, rows][:, :, columns]
