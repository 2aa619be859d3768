"""Attention in plain JAX that holds one block of scores at a time, in the forward and in the backward pass."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from diffuse_jax.kernels.platform import current_platform

BLOCK_BYTES = {"cpu": 4 << 20, "gpu": 256 << 20, "tpu": 256 << 20}
"""Float32 scores held at once: on a CPU what stays in its last-level cache, elsewhere little beside the activations."""

_MIN_ROWS = 32
"""Fewer query rows than this make slow matrix products, so a block has at least these."""


def blocked_attention(
    query: Array, key: Array, value: Array, mask: Array | None, is_causal: bool, scale: float
) -> Array:
    """As :func:`diffuse_jax.kernels.attention`, with a mask of rank 4 or None.

    On a CPU heads come one after the other: the scores of one head fit the cache, and XLA makes its fastest matrix
    products of two-dimensional operands. Elsewhere all heads go side by side. The batch axis is never looped over, so
    it can be cut across devices. The backward pass computes the scores again instead of keeping them.
    """
    batch, heads, length = query.shape[0], query.shape[2], key.shape[1]
    platform = current_platform()
    side_by_side = batch if platform == "cpu" else batch * heads
    rows = max(_MIN_ROWS, BLOCK_BYTES.get(platform, BLOCK_BYTES["gpu"]) // (4 * length * side_by_side))
    static = {"is_causal": is_causal, "scale": float(scale), "rows": rows, "one_by_one": platform == "cpu"}
    return _over_heads(query, key, value, mask, **static)


@partial(jax.jit, static_argnames=("is_causal", "scale", "rows", "one_by_one"), inline=True)
def _over_heads(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    *,
    is_causal: bool,
    scale: float,
    rows: int,
    one_by_one: bool,
) -> Array:
    """The same with what the platform decides; compiled once for its shapes where a network runs outside of a program.

    Args:
      rows: queries of one head at a time.
      one_by_one: one head after the other.
    """
    one_head = partial(_one_head, is_causal=is_causal, scale=scale, rows=rows)

    def all_batch(q: Array, k: Array, v: Array, m: Array | None) -> Array:  # [B,L,D], [B|1,Lq|1,Lk|1] -> [B,Lq,D]
        if m is None or m.shape[0] == 1:
            return jax.vmap(lambda q, k, v: one_head(q, k, v, None if m is None else m[0]))(q, k, v)
        return jax.vmap(one_head)(q, k, v, m)

    q, k, v = (jnp.moveaxis(x, 2, 0) for x in (query, key, value))
    shared = None if mask is None or mask.shape[1] != 1 else mask[:, 0]
    arguments: tuple[Array, ...] = (q, k, v)
    if mask is not None and shared is None:
        arguments = (q, k, v, jnp.moveaxis(mask, 1, 0))

    def body(args: tuple[Array, ...]) -> Array:
        q, k, v, *own = args
        return all_batch(q, k, v, own[0] if own else shared)

    over_heads = lax.map if one_by_one else lambda f, x: jax.vmap(f)(x)
    return jnp.moveaxis(over_heads(body, arguments), 0, 2)


def _one_head(
    query: Array, key: Array, value: Array, mask: Array | None, *, is_causal: bool, scale: float, rows: int
) -> Array:
    """[Lq,D], [Lk,D], [Lk,D], mask [Lq|1, Lk|1] -> [Lq,D], ``rows`` queries (or all, if fewer) at a time."""
    length = query.shape[0]
    block = jax.checkpoint(partial(_block, is_causal=is_causal, scale=scale))
    if rows >= length:
        return block(query, key, value, mask, jnp.int32(0))
    blocks = -(-length // rows)
    rows = -(-length // blocks)  # equal blocks: little padding for the last

    def split(x: Array) -> Array:  # [Lq, n] -> [blocks, rows, n]
        return jnp.pad(x, ((0, blocks * rows - length), (0, 0))).reshape(blocks, rows, x.shape[-1])

    offsets = jnp.arange(blocks, dtype=jnp.int32) * rows
    if mask is not None and mask.shape[0] != 1:
        out = lax.map(lambda x: block(x[0], key, value, x[1], x[2]), (split(query), split(mask), offsets))
    else:
        out = lax.map(lambda x: block(x[0], key, value, mask, x[1]), (split(query), offsets))
    return out.reshape(blocks * rows, -1)[:length]


def _block(
    query: Array, key: Array, value: Array, mask: Array | None, offset: Array, *, is_causal: bool, scale: float
) -> Array:
    """Some rows of one head; ``offset`` is the index of the first row (for the causal rule)."""
    scores = jnp.dot(query, key.T, preferred_element_type=jnp.float32) * scale
    lowest = jnp.finfo(jnp.float32).min
    if is_causal:
        row, column = (lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        scores = jnp.where(row + offset >= column, scores, lowest)
    if mask is not None:
        scores = jnp.where(jnp.broadcast_to(mask, scores.shape), scores, lowest)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    out = jnp.dot(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (out / weights.sum(-1, keepdims=True)).astype(query.dtype)
