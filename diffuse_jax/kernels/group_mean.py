"""Means over the groups of a group normalisation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from diffuse_jax.kernels.platform import current_platform


def group_mean(x: Array, groups: int, dtype: DTypeLike) -> Array:
    """The mean over positions and the channels of each group.

    On TPUs, for networks that compute in bfloat16, the sums over positions are matrix products with a row of ones: the
    matrix units add up what would take the vector units several times as long. float32 values are split into two
    bfloat16 parts, so that their relative error stays below 2**-16; products are accumulated in float32.

    Args:
      x: ``[B,...,C]``, bfloat16 or float32.
      groups: number of groups of neighbouring channels.
      dtype: the dtype that the network computes in.

    Returns:
      float32 ``[B,1,groups,1]``.
    """
    batch, *positions, channels = x.shape
    if current_platform() != "tpu" or jnp.dtype(dtype) != jnp.bfloat16:
        grouped = jnp.asarray(x, jnp.float32).reshape(batch, -1, groups, channels // groups)
        return grouped.mean((1, 3), keepdims=True)
    means = position_sums(x) / math.prod(positions)
    return means.reshape(batch, 1, groups, -1).mean(-1, keepdims=True)


@jax.custom_jvp
def position_sums(x: Array) -> Array:
    """Sums over the positions of ``x [B,...,C]``, bfloat16 or float32, by matrix products: float32 ``[B,C]``."""
    if x.dtype == jnp.bfloat16:
        return _product(x)
    high = x.astype(jnp.bfloat16)
    return _product(high) + _product((x - high.astype(jnp.float32)).astype(jnp.bfloat16))


def _product(x: Array) -> Array:
    # Eight equal rows, because a single one is a product of a vector, which is not given to the matrix units. The
    # positions keep their axes: to merge them would fix the layout, and cost copies between convolutions.
    ones = jnp.ones((x.shape[0], 8, *x.shape[1:-1]), x.dtype)
    along = tuple(range(2, ones.ndim)), tuple(range(1, x.ndim - 1))
    product = lax.dot_general(ones, x, (along, ((0,), (0,))), preferred_element_type=jnp.float32)
    return product[:, 0]


@position_sums.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # A sum, so that its transpose is a broadcast, which is fused with what follows; that of a product would be stored.
    tangent = tangents[0].astype(jnp.float32)
    return position_sums(*primals), tangent.sum(range(1, tangent.ndim - 1))
