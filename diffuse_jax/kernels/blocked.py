"""Attention in plain JAX that holds one block of scores at a time, in the forward and in the backward pass."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from diffuse_jax.kernels.platform import current_platform

BLOCK_BYTES = {"cpu": 4 << 20, "gpu": 256 << 20, "tpu": 256 << 20}
"""Size of the float32 scores held at once: fits a CPU's last-level cache; elsewhere small beside the activations."""

_MIN_ROWS = 32
"""Minimum query rows of a block, since matrix products with fewer are slow."""


def blocked_attention(
    query: Array, key: Array, value: Array, mask: Array | None, is_causal: bool, scale: float
) -> Array:
    """As :func:`diffuse_jax.kernels.attention`, with a mask of rank 4 or None.

    On a CPU, heads are computed one at a time: the scores of one head fit the cache, and XLA's matrix products are
    fastest with two-dimensional operands. Elsewhere all heads are computed together. The batch axis is never looped
    over, so it can be sharded across devices. The backward pass recomputes the scores instead of storing them.
    """
    batch, heads, length = query.shape[0], query.shape[2], key.shape[1]
    platform = current_platform()
    together = batch if platform == "cpu" else batch * heads
    rows = max(_MIN_ROWS, BLOCK_BYTES.get(platform, BLOCK_BYTES["gpu"]) // (4 * length * together))
    static = {"is_causal": is_causal, "scale": float(scale), "rows": rows, "sequential": platform == "cpu"}
    return _over_heads(query, key, value, mask, **static)


@partial(jax.jit, static_argnames=("is_causal", "scale", "rows", "sequential"), inline=True)
def _over_heads(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    *,
    is_causal: bool,
    scale: float,
    rows: int,
    sequential: bool,
) -> Array:
    """:func:`blocked_attention` with the platform's choices; compiled once per shape when a network runs eagerly.

    Args:
      rows: queries of one head per block.
      sequential: compute one head at a time.
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
        q, k, v, *masks = args
        return all_batch(q, k, v, masks[0] if masks else shared)

    over_heads = lax.map if sequential else lambda f, x: jax.vmap(f)(x)
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
    rows = -(-length // blocks)  # blocks of equal size, so that the last needs little padding

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
    """A block of rows of one head; ``offset`` is the index of its first row, for the causal mask."""
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
