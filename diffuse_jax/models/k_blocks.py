"""The levels of UNets of k-diffusion, which the x2 latent upscaler is made of (Crowson 2022).

They differ from those of Stable Diffusion: the embedding of the timestep scales and shifts every norm, resolutions
change by a fixed filter, attention has no feed-forward layer, and each level has a single skip connection.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.models.attention import Attention
from diffuse_jax.models.layers import ACTIVATIONS, Conv, Dense, normalised
from diffuse_jax.models.remat import remat_block, remat_level
from diffuse_jax.models.unet_blocks import Join

GROUP = 32
"""Channels of a group in every norm."""


class KLevel(NamedTuple):
    """One resolution of the downward or the upward path."""

    channels: int
    after: int  # channels of its output
    layers: int
    head_dim: int  # 0 without attention
    self_attention: bool
    resample: bool


def down_levels(
    channels: tuple[int, ...], layers: tuple[int, ...], head_dims: tuple[int, ...], attends: tuple[bool, ...]
) -> list[KLevel]:
    """The downward path, finest first; only the coarsest level attends to itself."""
    last = len(channels) - 1
    rows = enumerate(zip(channels, layers, head_dims, attends, strict=True))
    return [KLevel(c, c, n, dim if a else 0, a and i == last, i < last) for i, (c, n, dim, a) in rows]


def up_levels(
    channels: tuple[int, ...], layers: tuple[int, ...], head_dims: tuple[int, ...], attends: tuple[bool, ...]
) -> list[KLevel]:
    """The upward path, coarsest first; ``attends`` is in this order, the others are finest first.

    Widths of heads are taken in the order of the downward path, as PyTorch diffusers takes them.
    """
    last = len(channels) - 1
    rows = enumerate(zip(channels[::-1], layers[::-1], head_dims, attends, strict=True))
    return [
        KLevel(c, channels[max(last - i - 1, 0)], n, dim if a else 0, a and i == 0, i < last)
        for i, (c, n, dim, a) in rows
    ]


class KBlock(nn.Module):
    """Base of the blocks below."""

    eps: float = 1e-5
    act_fn: str = "gelu"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def dtypes(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @property
    def shared(self) -> dict[str, Any]:
        return {"eps": self.eps, "act_fn": self.act_fn, **self.dtypes}


class AdaGroupNorm(nn.Module):
    """Group normalisation of ``x [B,...,C]``, scaled and shifted by a projection of ``temb [B,D]``."""

    groups: int
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array) -> jax.Array:
        C = x.shape[-1]
        y = Dense(2 * C, dtype=self.dtype, param_dtype=self.param_dtype, name="linear")(temb)
        scale, shift = jnp.split(y.reshape(len(x), *(1,) * (x.ndim - 2), 2 * C), 2, -1)
        centred, inverse = normalised(x, self.groups, self.eps)
        return (centred * inverse).reshape(x.shape).astype(self.dtype) * (1 + scale) + shift


class KResnet(KBlock):
    """Norm, activation and convolution, twice, and a shortcut; ``after`` channels come out, ``channels`` between."""

    channels: int = 0
    after: int = 0
    groups_out: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.act_fn]
        norm = lambda x, groups, name: act(AdaGroupNorm(groups, self.eps, **self.dtypes, name=name)(x, temb))
        h = Conv(self.channels, **self.dtypes, name="conv1")(norm(x, x.shape[-1] // GROUP, "norm1"))
        h = Conv(self.after, **self.dtypes, name="conv2")(norm(h, self.groups_out, "norm2"))
        if x.shape[-1] != self.after:
            x = Conv(self.after, 1, padding=0, use_bias=False, **self.dtypes, name="conv_shortcut")(x)
        return x + h


class KAttention(KBlock):
    """Attention over pixels to themselves, if asked, and to ``context [B,L,D]``, each with a norm and a residual."""

    head_dim: int = 64
    self_attention: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array, context: jax.Array) -> jax.Array:
        B, H, W, C = x.shape

        def attend(x: jax.Array, i: int, context: jax.Array | None) -> jax.Array:
            h = AdaGroupNorm(max(1, C // GROUP), **self.dtypes, name=f"norm{i}")(x, temb).reshape(B, H * W, C)
            layer = Attention(C // self.head_dim, True, context is not None, **self.dtypes, name=f"attn{i}")
            return x + layer(h, context).reshape(B, H, W, C)

        return attend(attend(x, 1, None) if self.self_attention else x, 2, context)


class KLevelBlock(KBlock):
    """Base of one level: its residual blocks, each with attention after it if the level has any."""

    level: KLevel = KLevel(0, 0, 0, 0, False, False)
    remat: str = "none"

    def layer(self, i: int, x: jax.Array, temb: jax.Array, context: jax.Array) -> jax.Array:
        """The residual block and the attention ``i``."""
        level, last = self.level, i + 1 == self.level.layers
        after = level.after if last else level.channels
        # The last block narrows in its last convolution where there is attention, in its first where there is none.
        x = remat_block(KResnet, self.remat)(
            channels=level.channels if level.head_dim else after,
            after=after,
            groups_out=level.channels // GROUP,
            **self.shared,
            name=f"resnets_{i}",
        )(x, temb)
        if not level.head_dim:
            return x
        return remat_block(KAttention, self.remat)(
            head_dim=level.head_dim, self_attention=level.self_attention, **self.shared, name=f"attentions_{i}"
        )(x, temb, context)


class KDownBlock(KLevelBlock):
    """One level of the downward path; returns its output and its skip connection."""

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        for i in range(self.level.layers):
            x = self.layer(i, x, temb, context)
        return halved(x) if self.level.resample else x, x


class KUpBlock(KLevelBlock):
    """One level of the upward path, which begins with a skip connection, if there is one."""

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array | None, temb: jax.Array, context: jax.Array) -> jax.Array:
        x = x if skip is None else Join(name="joins_0")(x, skip)
        for i in range(self.level.layers):
            x = self.layer(i, x, temb, context)
        return doubled(x) if self.level.resample else x


class KLevels(KBlock):
    """All levels, from the output of ``conv_in`` to the input of what follows the upward path; same height and width.

    They are named as in the UNet that shares its scope with this module.
    """

    down: tuple[KLevel, ...] = ()
    up: tuple[KLevel, ...] = ()
    remat: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array, context: jax.Array) -> jax.Array:
        divisor = 2 ** (len(self.down) - 1)
        if x.shape[1] % divisor or x.shape[2] % divisor or min(x.shape[1:3]) < 2 * divisor:
            raise ValueError(
                f"height and width of this network's sample must be multiples of {divisor}, {2 * divisor} or more, got "
                f"{x.shape[1]} x {x.shape[2]}"
            )
        down_block, up_block = (remat_level(block, self.remat) for block in (KDownBlock, KUpBlock))
        shared = {**self.shared, "remat": self.remat}
        skips: list[jax.Array | None] = []
        for i, level in enumerate(self.down):
            x, skip = down_block(level=level, **shared, name=f"down_blocks_{i}")(x, temb, context)
            skips.append(skip)
        skips[-1] = None  # the coarsest level goes on from its own output
        for i, level in enumerate(self.up):
            x = up_block(level=level, **shared, name=f"up_blocks_{i}")(x, skips[-1 - i], temb, context)
        return x


def halved(x: jax.Array) -> jax.Array:
    """Filter ``[B,H,W,C]`` with (1, 3, 3, 1) / 8 along both axes and keep every second pixel."""
    for axis in (1, 2):
        p = reflected(x, axis)
        taps = [jax.lax.slice_in_dim(p, k, k + x.shape[axis] - 1, 2, axis) for k in range(4)]
        x = (taps[0] + 3 * taps[1] + 3 * taps[2] + taps[3]) / 8
    return x


def doubled(x: jax.Array) -> jax.Array:
    """Linear interpolation of ``[B,H,W,C]`` to twice the resolution: 3/4 of the nearest pixel, 1/4 of the next."""
    for axis in (1, 2):
        n, p = x.shape[axis], reflected(x, axis)
        before, after = (jax.lax.slice_in_dim(p, k, k + n, 1, axis) for k in (0, 2))
        pairs = jnp.stack([(before + 3 * x) / 4, (3 * x + after) / 4], axis + 1)
        x = pairs.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
    return x


def reflected(x: jax.Array, axis: int) -> jax.Array:
    """One more element at both ends of an axis, the second from each end."""
    return jnp.pad(x, [(int(i == axis),) * 2 for i in range(x.ndim)], mode="reflect")
