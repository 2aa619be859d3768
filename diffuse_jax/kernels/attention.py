"""Scaled dot-product attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> Array:
    """softmax(scale q k^T) v for every head; query [B,Lq,H,D], key and value [B,Lk,H,D] -> [B,Lq,H,D] in query's dtype."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    if is_causal:
        scores = jnp.where(jnp.tri(scores.shape[-2], scores.shape[-1], dtype=bool)[None, None], scores, -jnp.inf)
    if mask is not None:
        scores = jnp.where(jnp.broadcast_to(mask, scores.shape), scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).astype(query.dtype)
