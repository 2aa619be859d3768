"""Residual convolution blocks and the layers that change resolution."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.models.layers import ACTIVATIONS, Conv, Dense, GroupNorm
from diffuse_jax.models.resampling import smooth_down, smooth_up


class ResnetNames(NamedTuple):
    """What a checkpoint calls the parts of a residual block; the defaults are those of diffusers."""

    norm1: str = "norm1"
    conv1: str = "conv1"
    time_emb_proj: str = "time_emb_proj"
    norm2: str = "norm2"
    conv2: str = "conv2"
    conv_shortcut: str = "conv_shortcut"


class ResnetBlock(nn.Module):
    """Norm, activation and convolution, twice, with the time embedding in between and a shortcut connection.

    ``time_scale_shift``: "default" adds the projected time embedding after the first convolution (Ho et al. 2020);
    "scale_shift" lets it scale and shift the second norm (Dhariwal & Nichol 2021, adaptive group norm).
    ``resample``: what :func:`change_size` does before the first convolution and in the shortcut. ``time_act``: whether
    the activation is applied to the time embedding. The result is divided by ``output_scale``. ``groups_out``: groups
    of the second norm, if not as many as of the first. ``shortcut``: whether the shortcut is a layer, even if the
    number of channels stays.
    """

    channels: int
    groups: int = 32
    eps: float = 1e-5
    act_fn: str = "silu"
    time_scale_shift: str = "default"
    resample: str | None = None
    time_act: bool = True
    output_scale: float = 1.0
    names: ResnetNames = ResnetNames()
    groups_out: int | None = None
    shortcut: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array | None = None, codes: jax.Array | None = None) -> jax.Array:
        """``x [B,H,W,C]``, ``temb [B,D]`` (none in an autoencoder) -> ``[B,H,W,channels]``, resampled if asked.

        With ``codes [B,h,w,c]`` the norms are :class:`SpatialNorm`.
        """
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        act = ACTIVATIONS[self.act_fn]
        shift = scale = None
        if temb is not None:
            width = self.channels * (2 if self.time_scale_shift == "scale_shift" else 1)
            shift = Dense(width, **dtypes, name=self.names.time_emb_proj)(act(temb) if self.time_act else temb)
            shift = shift[:, None, None, :]
            if self.time_scale_shift == "scale_shift":
                scale, shift = jnp.split(shift, 2, axis=-1)

        h = act(self.norm(self.names.norm1, x, codes, self.groups))
        x, h = change_size(x, self.resample), change_size(h, self.resample)
        h = Conv(self.channels, **dtypes, name=self.names.conv1)(h)
        if shift is not None and scale is None:
            h = h + shift
        h = self.norm(self.names.norm2, h, codes, self.groups_out or self.groups)
        if shift is not None and scale is not None:
            h = h * (1 + scale) + shift
        h = Conv(self.channels, **dtypes, name=self.names.conv2)(act(h))
        if self.shortcut or x.shape[-1] != self.channels:
            x = Conv(self.channels, kernel_size=1, padding=0, **dtypes, name=self.names.conv_shortcut)(x)
        return x + h if self.output_scale == 1 else (x + h) / self.output_scale

    def norm(self, name: str, x: jax.Array, codes: jax.Array | None, groups: int) -> jax.Array:
        """The norm of this name, of ``x``; the groups do not matter with codes."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if codes is None:
            return GroupNorm(groups, self.eps, **dtypes, name=name)(x)
        return SpatialNorm(**dtypes, name=name)(x, codes)


class SpatialNorm(nn.Module):
    """Group normalisation whose scale and shift depend on the position (Zheng et al. 2022, MoVQ, 2209.09002).

    Both are projections of the latent that lies over the pixel; the groups are 32 in every checkpoint.
    """

    groups: int = 32
    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, codes: jax.Array) -> jax.Array:
        """``x [B,H,W,C]`` and latents ``[B,h,w,c]`` -> ``[B,H,W,C]``."""
        C, size = x.shape[-1], (x.shape[1], x.shape[2])
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # Projected first: a projection of each pixel and a repetition of pixels may be exchanged.
        project = lambda name: nearest(Conv(C, kernel_size=1, padding=0, **dtypes, name=name)(codes), size)
        normal = GroupNorm(self.groups, self.eps, **dtypes, name="norm_layer")(x)
        return normal * project("conv_y") + project("conv_b")


class Downsample(nn.Module):
    """A strided convolution that halves the resolution; padding 0 pads one row below and one column on the right."""

    channels: int
    padding: int = 1
    conv_name: str = "conv"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pads = ((0, 1), (0, 1)) if self.padding == 0 else self.padding
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Conv(self.channels, stride=2, padding=pads, **dtypes, name=self.conv_name)(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling, by two or to a given ``(H, W)``, then a convolution."""

    channels: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        x = nearest(x, size or (2 * x.shape[1], 2 * x.shape[2]))
        return Conv(self.channels, dtype=self.dtype, param_dtype=self.param_dtype, name="conv")(x)


def nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Upsample ``[B,H,W,C]`` to ``[B,*size,C]``; pixel ``i`` of ``n`` reads source pixel ``floor(i * H / n)``."""
    B, H, W, C = x.shape
    if size == (2 * H, 2 * W):  # a broadcast, which XLA fuses; the gather below it does not
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (B, H, 2, W, 2, C))
        return x.reshape(B, 2 * H, 2 * W, C)
    rows = jnp.arange(size[0], dtype=jnp.int32) * H // size[0]
    columns = jnp.arange(size[1], dtype=jnp.int32) * W // size[1]
    return x[:, rows][:, :, columns]


def halve(x: jax.Array) -> jax.Array:
    """Average pooling over 2 x 2 pixels, ``[B,H,W,C]`` -> ``[B,H/2,W/2,C]``; ``H`` and ``W`` must be even."""
    B, H, W, C = x.shape
    return x.reshape(B, H // 2, 2, W // 2, 2, C).mean((2, 4))


def change_size(x: jax.Array, direction: str | None) -> jax.Array:
    """Upsample ``[B,H,W,C]`` by two ("up", nearest neighbour), downsample it ("down", average) or keep it (None);
    "smooth_up" and "smooth_down" are with the filter of :mod:`~diffuse_jax.models.resampling`."""
    match direction:
        case "up":
            return nearest(x, (2 * x.shape[1], 2 * x.shape[2]))
        case "down":
            return halve(x)
        case "smooth_up":
            return smooth_up(x)
        case "smooth_down":
            return smooth_down(x)
        case None:
            return x
        case _:
            raise ValueError(f"resample={direction!r}; expected 'up', 'down', 'smooth_up', 'smooth_down' or None")
