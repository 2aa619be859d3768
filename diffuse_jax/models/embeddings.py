"""Embeddings of timesteps, labels and other scalar conditioning."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.models.layers import ACTIVATIONS, Dense, parameter
from diffuse_jax.sharding import gathered


def sinusoidal_embedding(t: jax.Array, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> jax.Array:
    """Sines and cosines of ``t`` at ``dim / 2`` geometric frequencies from 1 to 1/10000 (Vaswani et al. 2017, 3.5).

    Args:
      t: ``[B]``, any real dtype; computed in float32.
      dim: width of the result; an odd ``dim`` gets one zero at the end.
      flip_sin_to_cos: cosines first, as Stable Diffusion has it, instead of sines first.
      freq_shift: subtracted from the number of frequencies in the exponent's denominator (1 in the original DDPM).

    Returns: ``[B, dim]`` float32.
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = jnp.asarray(t, jnp.float32)[:, None] * frequencies[None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    embedding = jnp.concatenate([cos, sin] if flip_sin_to_cos else [sin, cos], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim - 2 * half)))


class FourierProjection(nn.Module):
    """Sines and cosines of ``t [B]`` at random frequencies, which are never trained (Song et al. 2021, C.2).

    The result, ``[B, 2 * half]``, is in float32. ``log``: of the logarithm of ``t``, which is above 0. ``deviation``:
    of the frequencies at the start of training.
    """

    half: int
    flip_sin_to_cos: bool = True
    log: bool = False
    deviation: float = 1.0
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", nn.initializers.normal(self.deviation), (self.half,))
        frequencies = jax.lax.stop_gradient(jnp.asarray(weight, jnp.float32))
        # In this order: large angles are as inexact as those that the network was trained with.
        t = jnp.asarray(t, jnp.float32)
        t = jnp.log(t) if self.log else t
        angles = t[:, None] * frequencies[None, :] * 2 * math.pi
        sin, cos = jnp.sin(angles), jnp.cos(angles)
        return jnp.concatenate([cos, sin] if self.flip_sin_to_cos else [sin, cos], axis=-1)


class TimestepEmbedding(nn.Module):
    """Two dense layers with an activation between, ``[B,D] -> [B,dim]``; first adds a projection of ``condition``.

    ``post_act`` is the name of one more activation at the end. ``out_dim`` is the width of the result, if not ``dim``.
    """

    dim: int
    act_fn: str = "silu"
    cond_dim: int | None = None
    post_act: str | None = None
    out_dim: int | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.cond_dim is not None:
            project = Dense(x.shape[-1], use_bias=False, **dtypes, name="cond_proj")
            condition = jnp.zeros((x.shape[0], self.cond_dim), x.dtype) if condition is None else condition
            x = x + project(condition)
        x = Dense(self.dim, **dtypes, name="linear_1")(x)
        x = Dense(self.out_dim or self.dim, **dtypes, name="linear_2")(ACTIVATIONS[self.act_fn](x))
        return x if self.post_act is None else ACTIVATIONS[self.post_act](x)


class Embedding(nn.Module):
    """A table ``embedding [num, dim]`` indexed by integer ids: ``[...] -> [..., dim]``."""

    num: int
    dim: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        table = parameter(self, "embedding", nn.initializers.normal(0.02), (self.num, self.dim))
        return jnp.take(gathered((*self.path, "embedding"), jnp.asarray(table, self.dtype)), ids, axis=0)
