"""One Brownian path per key, at any time: the virtual Brownian tree of Li et al. 2020 (arXiv 2001.01328, alg. 3).

Nothing is stored. The value at a time is found by repeatedly halving [0, 1] towards it; every midpoint is drawn from
the Brownian bridge between its neighbours with its own key, so every query in every run gets the same value.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

DEPTH = 24
"""Number of halvings: times are rounded to multiples of ``2**-24``, the resolution of float32 just below 1."""

PATH = 0x42726F77
"""Folded into a key to derive its path's key, distinct from the keys of independent noise."""


def ticks(time: jax.Array) -> jax.Array:
    """A time in [0, 1] in units of the finest interval."""
    return jnp.clip(jnp.round(time * 2.0**DEPTH), 0, 2**DEPTH - 1).astype(jnp.int32)


def increment(key: jax.Array, start: jax.Array, end: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The path's increment between two times in ticks, ``start < end``, scaled to variance 1."""
    change = position(key, end, shape) - position(key, start, shape)
    return change * jax.lax.rsqrt(jnp.maximum(end - start, 1).astype(jnp.float32) * jnp.float32(2.0**-DEPTH))


def position(key: jax.Array, tick: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The path of one key at a time in ticks."""
    key = jax.random.fold_in(key, PATH)

    def halve(level: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        node, spread, low, high = carry
        # A bridge over an interval of length w has variance w / 4 in its middle.
        middle = (low + high) / 2 + spread * jax.random.normal(jax.random.fold_in(key, node), shape, jnp.float32)
        right = (tick >> (DEPTH - 1 - jnp.asarray(level, jnp.int32))) & 1
        low, high = jnp.where(right == 1, middle, low), jnp.where(right == 1, high, middle)
        return 2 * node + right, spread * jnp.float32(0.5**0.5), low, high

    end = jax.random.normal(jax.random.fold_in(key, 0), shape, jnp.float32)
    carry = (jnp.int32(1), jnp.float32(0.5), jnp.zeros(shape, jnp.float32), end)
    return jax.lax.fori_loop(0, DEPTH, halve, carry)[2]
