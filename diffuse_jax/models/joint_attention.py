"""Attention from pixels to the prompt and to themselves in one softmax (Nichol et al. 2022, GLIDE, 2.2)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.models.attention import Attend
from diffuse_jax.models.layers import Dense, GroupNorm, LayerNorm

NORM_GROUPS = 32
"""Groups of the prompt's group norm, whatever the network's own ``norm_num_groups``."""


class JointAttention(nn.Module):
    """Each pixel attends to the prompt and to all pixels at once, after a group norm and with a residual.

    ``only_context`` leaves out the pixels' own keys and values. ``context_norm`` is the prompt's: "layer_norm",
    "group_norm" (over positions too) or None.
    """

    heads: int
    groups: int
    only_context: bool = False
    context_norm: str | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """``x [B,H,W,C]``, ``context [B,K,E]`` -> ``[B,H,W,C]``; ``C`` must be a multiple of ``heads``."""
        B, H, W, C = x.shape
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = lambda source, name: Dense(C, **dtypes, name=name)(source)
        split = lambda y: y.reshape(B, -1, self.heads, C // self.heads)
        match self.context_norm:
            case "layer_norm":
                context = LayerNorm(**dtypes, name="norm_cross")(context)
            case "group_norm":
                context = GroupNorm(NORM_GROUPS, **dtypes, name="norm_cross")(context)
        pixels = GroupNorm(self.groups, **dtypes, name="group_norm")(x).reshape(B, H * W, C)
        query = split(dense(pixels, "to_q"))
        key, value = split(dense(context, "add_k_proj")), split(dense(context, "add_v_proj"))
        if not self.only_context:
            key = jnp.concatenate([key, split(dense(pixels, "to_k"))], 1)
            value = jnp.concatenate([value, split(dense(pixels, "to_v"))], 1)
        h = Attend(name="attend")(query, key, value).reshape(B, H * W, C)
        return x + dense(h, "to_out_0").reshape(B, H, W, C)
