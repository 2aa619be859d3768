"""Means over the groups of a group normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from diffuse_jax.kernels.platform import current_platform


def group_mean(x: Array, dtype: DTypeLike) -> Array:
    """The mean over positions and the channels of each group.

    On TPUs, for networks that compute in bfloat16, the sums over positions are matrix products with a row of ones,
    which by the compiler's estimate takes a fraction of the time of the vector units. float32 values are split into two
    bfloat16 parts, so that their relative error stays below 2**-16; products are accumulated in float32.

    Args:
      x: ``[B,N,groups,C/groups]``, bfloat16 or float32.
      dtype: the dtype that the network computes in.

    Returns:
      float32 ``[B,1,groups,1]``.
    """
    if current_platform() != "tpu" or jnp.dtype(dtype) != jnp.bfloat16:
        return jnp.asarray(x, jnp.float32).mean((1, 3), keepdims=True)
    batch, positions, groups, channels = x.shape
    sums = position_sums(x.reshape(batch, positions, groups * channels))
    return sums.reshape(batch, 1, groups, channels).sum(-1, keepdims=True) / (positions * channels)


@jax.custom_jvp
def position_sums(x: Array) -> Array:
    """Sums over ``N`` of ``x [B,N,C]``, bfloat16 or float32, by matrix products: float32 ``[B,C]``."""
    if x.dtype == jnp.bfloat16:
        return _product(x)
    high = x.astype(jnp.bfloat16)
    return _product(high) + _product((x - high.astype(jnp.float32)).astype(jnp.bfloat16))


def _product(x: Array) -> Array:
    # Eight equal rows, because a single one is a product of a vector, which is not given to the matrix units.
    ones = jnp.ones((x.shape[0], 8, x.shape[1]), x.dtype)
    return jnp.einsum("bkn,bnc->bkc", ones, x, preferred_element_type=jnp.float32)[:, 0]


@position_sums.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # A sum, so that its transpose is a broadcast, which is fused with what follows; that of a product would be stored.
    return position_sums(*primals), tangents[0].astype(jnp.float32).sum(1)
