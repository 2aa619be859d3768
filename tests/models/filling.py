"""Random parameters for tests, by NumPy: compiling random initialisers takes minutes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def random_params(shapes: Any, rng: np.random.Generator, dtype: Any = jnp.float32) -> Any:
    """A tree of parameters that keeps activations near unit size and leaves no scale one and no bias zero."""

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = rng.standard_normal(leaf.shape)
        match path[-1].key:
            case "kernel":
                noise /= math.sqrt(math.prod(leaf.shape[:-1]))
            case "scale":
                noise = 1 + 0.2 * noise
            case "bias":
                noise *= 0.2
        return jnp.asarray(noise, dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)
