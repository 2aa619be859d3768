"""Attention of long sequences divided over devices: each computes its own queries with all keys and values."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import Array
from jax.sharding import PartitionSpec

from diffuse_jax.sharding import automatic_axes

AXIS = "sequence"

Run = Callable[[Array, Array, Array, Array | None], Array]
"""``run(query, key, value, mask)``, shapes as in :func:`diffuse_jax.kernels.attention`, mask of rank 4 or None."""


def is_divided(queries: int) -> bool:
    """Whether so many queries are divided over the axis ``sequence`` of the current mesh: if it divides them evenly,
    and there are enough for a square image whose rows it divides evenly."""
    if AXIS not in automatic_axes():
        return False
    size = jax.sharding.get_abstract_mesh().shape[AXIS]
    return queries % size == 0 and queries >= size**2


def each_its_queries(run: Run, query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """``run`` on each device along ``sequence``, with its part of the queries; the result is divided like them.

    Keys and values are gathered; where they are whole already, as those of a prompt are, nothing moves. Inside, the
    compiler does not see the axis, so a loop over blocks of queries runs over those of one device, and a kernel that
    XLA cannot divide (Pallas) gets all of its operands.
    """
    rows, whole = PartitionSpec(None, AXIS), PartitionSpec()
    of_mask = whole if mask is None or mask.shape[2] == 1 else PartitionSpec(None, None, AXIS)
    specs = (rows, whole, whole, of_mask)
    return jax.shard_map(run, in_specs=specs, out_specs=rows, axis_names={AXIS}, check_vma=False)(
        query, key, value, mask
    )
