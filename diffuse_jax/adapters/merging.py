"""Adapters merged into kernels, for one that is fixed: nothing is left to compute, and nothing is compiled."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.adapters.changes import Change
from diffuse_jax.models.base import Params
from diffuse_jax.weights.names import Path, flatten, from_torch, to_torch, unflatten

KERNEL = "kernel"


def difference(change: Change, kernel: jax.Array) -> np.ndarray:
    """What a change adds to a kernel, float32 of the kernel's shape."""
    weight = to_torch((KERNEL,), np.asarray(jax.device_get(kernel))) if change.needs_weight else None
    return from_torch((KERNEL,), change.difference(weight))


def merged(params: Params, changes: Mapping[Path, Change], scale: float = 1.0) -> Params:
    """Parameters with ``scale`` times the changes added to the kernels, summed in float32 and cast to their dtype.

    Args:
      params: the network's parameters.
      changes: path of the layer -> change of its kernel, which must fit.
      scale: strength; between 0 and 1, a DoRA is as far on the way from the old kernel to the new one.
    """
    flat = flatten(params)
    for path, change in changes.items():
        kernel = flat[(*path, KERNEL)]
        added = np.float32(scale) * difference(change, kernel)
        flat[(*path, KERNEL)] = (jnp.asarray(kernel, jnp.float32) + added).astype(kernel.dtype)
    return unflatten(flat)
