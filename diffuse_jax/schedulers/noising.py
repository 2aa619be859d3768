"""Noising of clean samples on a device, from noise levels ``(alpha, sigma)``.

JAX is imported where it is used, because a scheduler's settings and tables do without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffuse_jax.schedulers.noise_schedule import Array

if TYPE_CHECKING:
    import jax


def lookup(levels: Array, t: Any) -> jax.Array:
    """The rows of ``levels [n, 2]`` at whole timesteps ``t``, float32 ``[*t.shape, 2]``."""
    import jax.numpy as jnp

    return jnp.asarray(levels, jnp.float32)[jnp.asarray(t).astype(jnp.int32)]


def columns(levels: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """alpha and sigma of ``levels [..., 2]`` as factors of ``like``."""
    shape = levels.shape[:-1] + (1,) * (like.ndim + 1 - levels.ndim)
    return levels[..., 0].reshape(shape), levels[..., 1].reshape(shape)


def noised(levels: jax.Array, x0: jax.Array, noise: jax.Array) -> jax.Array:
    """``alpha * x0 + sigma * noise``, computed in float32, in the dtype of ``x0``."""
    import jax.numpy as jnp

    alpha, sigma = columns(levels, x0)
    return (alpha * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)).astype(x0.dtype)


def velocity(levels: jax.Array, x0: jax.Array, noise: jax.Array) -> jax.Array:
    """``alpha * noise - sigma * x0`` (Salimans and Ho 2022), computed in float32, in the dtype of ``x0``."""
    import jax.numpy as jnp

    alpha, sigma = columns(levels, x0)
    return (alpha * noise.astype(jnp.float32) - sigma * x0.astype(jnp.float32)).astype(x0.dtype)
