"""What the networks of Würstchen are made of: blocks in the manner of ConvNeXt, conditioned by scales, shifts and
attention (Pernias et al. 2023, arXiv 2306.00637)."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from diffuse_jax.models.attention import Attention
from diffuse_jax.models.layers import ACTIVATIONS, Dense, parameter

EPS = 1e-6


def centred(x: jax.Array) -> jax.Array:
    """Layer normalisation over the last axis without parameters, in float32; the result has the dtype of ``x``."""
    x32 = jnp.asarray(x, jnp.float32)
    y = x32 - x32.mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPS)).astype(x.dtype)


def time_embedding(t: jax.Array, batch: int, dim: int) -> jax.Array:
    """Sines and cosines of times from 1 (noise) to 0, a scalar or ``[batch]`` -> ``[batch,dim]`` float32.

    Angles reach 10000, where an error of rounding in a frequency shows in the fourth digit of its sine: frequencies are
    rounded as in PyTorch, on which the published networks were trained.
    """
    half = dim // 2
    exponents = np.arange(half, dtype=np.float32) * np.float32(-math.log(10_000) / max(half - 1, 1))
    times = jnp.broadcast_to(jnp.asarray(t, jnp.float32), (batch,))
    angles = (10_000 * times)[:, None] * np.exp(exponents)[None]
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    return jnp.pad(waves, ((0, 0), (0, dim - 2 * half)))


def unshuffled(x: jax.Array, factor: int) -> jax.Array:
    """Squares of pixels as channels, ``[B,fH,fW,C] -> [B,H,W,C f f]``; those of one channel are consecutive."""
    B, H, W, C = x.shape
    y = x.reshape(B, H // factor, factor, W // factor, factor, C)
    return y.transpose(0, 1, 3, 5, 2, 4).reshape(B, H // factor, W // factor, C * factor**2)


def shuffled(x: jax.Array, factor: int) -> jax.Array:
    """The inverse of :func:`unshuffled`, ``[B,H,W,C f f] -> [B,fH,fW,C]``."""
    B, H, W, C = x.shape
    y = x.reshape(B, H, W, C // factor**2, factor, factor)
    return y.transpose(0, 1, 4, 2, 5, 3).reshape(B, H * factor, W * factor, C // factor**2)


class Layer(nn.Module):
    """Base of the layers below."""

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def dtypes(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class Depthwise(Layer):
    """A convolution of each channel by itself, ``[B,H,W,C] -> [B,H',W',C]``; kernel ``[k,k,1,C]``, ``padding`` zeros on
    each side."""

    kernel_size: int = 3
    padding: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k, C = self.kernel_size, x.shape[-1]
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), (k, k, 1, C))
        bias = parameter(self, "bias", nn.initializers.zeros_init(), (C,))
        y = jax.lax.conv_general_dilated(
            jnp.asarray(x, self.dtype),
            jnp.asarray(kernel, self.dtype),
            (1, 1),
            [(self.padding, self.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=C,
        )
        return y + jnp.asarray(bias, self.dtype).reshape(1, 1, 1, -1)


class Transposed(Layer):
    """A transposed convolution that doubles the resolution, ``[B,H,W,C] -> [B,2H,2W,features]``.

    Its kernel is ``[k,k,features,C]``: PyTorch has inputs first for transposed convolutions. ``padding`` pixels are cut
    off each side of the result.
    """

    features: int = 1
    kernel_size: int = 2
    padding: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k, pad = self.kernel_size, self.kernel_size - 1 - self.padding
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), (k, k, self.features, x.shape[-1]))
        bias = parameter(self, "bias", nn.initializers.zeros_init(), (self.features,))
        y = jax.lax.conv_general_dilated(
            jnp.asarray(x, self.dtype),
            jnp.asarray(kernel, self.dtype)[::-1, ::-1],
            (1, 1),
            [(pad, pad)] * 2,
            lhs_dilation=(2, 2),
            dimension_numbers=("NHWC", "HWOI", "NHWC"),
        )
        return y + jnp.asarray(bias, self.dtype).reshape(1, 1, 1, -1)


class ResponseNorm(Layer):
    """Each channel by its share of the whole response, with a residual (Woo et al. 2023, ConvNeXt V2, 3.2)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (1, 1, 1, x.shape[-1])
        gamma = parameter(self, "gamma", nn.initializers.zeros_init(), shape)
        beta = parameter(self, "beta", nn.initializers.zeros_init(), shape)
        x32 = jnp.asarray(x, jnp.float32)
        response = jnp.sqrt(jnp.square(x32).sum((1, 2), keepdims=True))
        share = response / (response.mean(-1, keepdims=True) + EPS)
        y = jnp.asarray(gamma, jnp.float32) * (x32 * share) + jnp.asarray(beta, jnp.float32) + x32
        return y.astype(self.dtype)


class ConvBlock(Layer):
    """A depthwise convolution, and two dense layers over the channels, with a residual.

    ``beside [B,H,W,E]`` are further channels that the dense layers see.
    """

    kernel_size: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, beside: jax.Array | None = None) -> jax.Array:
        C = x.shape[-1]
        conv = Depthwise(kernel_size=self.kernel_size, padding=self.kernel_size // 2, **self.dtypes, name="depthwise")
        h = centred(conv(x))
        h = h if beside is None else jnp.concatenate([h, beside.astype(h.dtype)], -1)
        h = ACTIVATIONS["gelu"](Dense(4 * C, **self.dtypes, name="channelwise_0")(h))
        h = ResponseNorm(**self.dtypes, name="channelwise_2")(h)
        return x + Dense(C, **self.dtypes, name="channelwise_4")(h)


class TimeBlock(Layer):
    """The channels scaled and shifted by a projection of the time's embedding ``[B,D]``."""

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        both = Dense(2 * x.shape[-1], **self.dtypes, name="mapper")(time)[:, None, None]
        scale, shift = jnp.split(both, 2, -1)
        return x * (1 + scale) + shift


class AttentionBlock(Layer):
    """Attention of the pixels to each other and to ``context [B,L,E]`` at once, with a residual."""

    heads: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        words = Dense(C, **self.dtypes, name="kv_mapper_1")(nn.silu(context))
        pixels = centred(x).reshape(B, H * W, C)
        attend = Attention(self.heads, qkv_bias=True, **self.dtypes, name="attention")
        return x + attend(pixels, jnp.concatenate([pixels, words.astype(pixels.dtype)], 1)).reshape(x.shape)
