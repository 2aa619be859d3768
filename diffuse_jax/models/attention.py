"""Attention and transformer blocks over sequences ``[B,L,D]``."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.kernels import attention
from diffuse_jax.models.layers import ACTIVATIONS, Conv, Dense, GroupNorm, LayerNorm
from diffuse_jax.models.remat import remat_block


class Attention(nn.Module):
    """Multi-head attention from ``x`` to ``context``, or to itself if that is None (Vaswani et al. 2017, 3.2).

    ``context_norm``: a layer norm of the context comes first.
    """

    heads: int
    qkv_bias: bool = False
    context_norm: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None, *, mask: jax.Array | None = None) -> jax.Array:
        """``x [B,L,D]``, ``context [B,K,E]`` -> ``[B,L,D]``; ``D`` must be a multiple of ``heads``.

        ``mask``: bool, broadcastable to ``[B,heads,L,K]``, true where ``x`` may attend to the context.
        """
        B, L, D = x.shape
        if D % self.heads:
            raise ValueError(f"width {D} cannot be split into {self.heads} heads (attention_head_dim)")
        context = x if context is None else context
        if self.context_norm:
            context = LayerNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm_cross")(context)
        dense = lambda source, bias, name: Dense(
            D, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name
        )(source)
        split = lambda y: y.reshape(B, -1, self.heads, D // self.heads)
        query = split(dense(x, self.qkv_bias, "to_q"))
        key = split(dense(context, self.qkv_bias, "to_k"))
        value = split(dense(context, self.qkv_bias, "to_v"))
        masked = {} if mask is None else {"mask": mask}
        return dense(Attend(name="attend")(query, key, value, **masked).reshape(B, L, D), True, "to_out_0")


class Attend(nn.Module):
    """Softmax attention, without parameters; a layer so that adapters can intercept its inputs (intercept.py)."""

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """``query [B,L,heads,D]``, ``key`` and ``value [B,K,heads,D]`` -> ``[B,L,heads,D]``; ``mask`` as of
        :class:`Attention`."""
        return attention(query, key, value, mask=mask)


class SpatialAttention(nn.Module):
    """Self-attention over the pixels of a feature map, ``[B,H,W,C] -> [B,H,W,C]``, without the residual.

    A group norm comes first unless ``groups`` is None. The parameters of norm and attention share one level of names.
    """

    heads: int
    groups: int | None
    eps: float
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = x if self.groups is None else GroupNorm(self.groups, self.eps, **dtypes, name="group_norm")(x)
        attend = Attention(self.heads, qkv_bias=True, **dtypes, name=None)
        nn.share_scope(self, attend)
        return attend(h.reshape(B, H * W, C)).reshape(B, H, W, C)


class GELU(nn.Module):
    """``gelu`` of a projection."""

    features: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = Dense(self.features, dtype=self.dtype, param_dtype=self.param_dtype, name="proj")(x)
        return ACTIVATIONS["gelu"](h)


class GEGLU(nn.Module):
    """``value * gelu(gate)``, where one projection gives both (Shazeer 2020, equation 6)."""

    features: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = Dense(2 * self.features, dtype=self.dtype, param_dtype=self.param_dtype, name="proj")(x)
        value, gate = jnp.split(h, 2, axis=-1)
        return value * ACTIVATIONS["gelu"](gate)


class FeedForward(nn.Module):
    """A layer of width ``4 D``, gated unless ``layer`` is another, and a projection back: ``[B,L,D] -> [B,L,D]``."""

    layer: type[GEGLU] | type[GELU] = GEGLU
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D = x.shape[-1]
        h = self.layer(4 * D, dtype=self.dtype, param_dtype=self.param_dtype, name="net_0")(x)
        return Dense(D, dtype=self.dtype, param_dtype=self.param_dtype, name="net_2")(h)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a norm and with a residual (Rombach et al. 2022, B).

    ``only_cross_attention``: the first attention attends to ``context`` too, as in the x4 upscaler.
    """

    heads: int
    only_cross_attention: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        first = context if self.only_cross_attention else None
        x = x + Attention(self.heads, **dtypes, name="attn1")(LayerNorm(**dtypes, name="norm1")(x), first)
        x = x + Attention(self.heads, **dtypes, name="attn2")(LayerNorm(**dtypes, name="norm2")(x), context)
        return x + FeedForward(**dtypes, name="ff")(LayerNorm(**dtypes, name="norm3")(x))


class Transformer2D(nn.Module):
    """``depth`` transformer blocks over the pixels of a feature map, between two projections and with a residual.

    ``linear_projection`` says whether the checkpoint stores the projections as dense layers (SD 2.x, SDXL) or as
    pointwise convolutions (SD 1.x); the results are the same.
    """

    heads: int
    depth: int = 1
    groups: int = 32
    linear_projection: bool = False
    only_cross_attention: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """``x [B,H,W,C]``, ``context [B,K,E]`` -> ``[B,H,W,C]``."""
        B, H, W, C = x.shape
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        project = (
            (lambda name: Dense(C, **dtypes, name=name))
            if self.linear_projection
            else (lambda name: Conv(C, kernel_size=1, padding=0, **dtypes, name=name))
        )
        h = project("proj_in")(GroupNorm(self.groups, 1e-6, **dtypes, name="norm")(x)).reshape(B, H * W, C)
        for i in range(self.depth):
            block = remat_block(TransformerBlock, self.remat)
            h = block(self.heads, self.only_cross_attention, **dtypes, name=f"transformer_blocks_{i}")(h, context)
        return x + project("proj_out")(h.reshape(B, H, W, C))
