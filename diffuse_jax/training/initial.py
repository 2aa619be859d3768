"""Fresh parameters for training from nothing, made by NumPy so that no initialiser has to be compiled."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
import numpy as np

from diffuse_jax.models.base import Params

ZERO_AT_START = (r"/conv2/kernel$", r"/proj_out/kernel$", r"^conv_out/kernel$")
"""Last layers of residual branches, and of a denoising network: it starts as the identity (Goyal et al. 2017, 5.1)."""


def initial_params(shapes: Params, seed: int, zero: Sequence[str] = ZERO_AT_START) -> Params:
    """Float32 parameters for a tree of shapes (:meth:`Model.shapes`), the same for the same seed on every machine.

    Kernels are normal with variance 1 / fan-in (LeCun et al. 1998, 4.6), embeddings normal with deviation 0.02, norms
    the identity and biases zero. A parameter whose joined path matches a pattern of ``zero`` starts as zero.
    """
    rng = np.random.default_rng(seed)
    zeros = re.compile("|".join(zero) or "(?!)")

    def fresh(path: tuple[jax.tree_util.DictKey, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        name = "/".join(key.key for key in path)
        deviation = _deviation(name.rsplit("/", 1)[-1], shape.shape)
        noise = rng.standard_normal(shape.shape, dtype=np.float32) * np.float32(deviation)
        if zeros.search(name):
            return np.zeros_like(noise)
        return noise + 1 if name.endswith("scale") else noise

    return jax.tree_util.tree_map_with_path(fresh, shapes)


def _deviation(leaf: str, shape: tuple[int, ...]) -> float:
    match leaf:
        case "kernel":
            return float(np.prod(shape[:-1])) ** -0.5
        case "embedding":
            return 0.02
        case "scale" | "bias":
            return 0.0
    raise ValueError(
        f"no rule for the first value of a parameter named {leaf!r}; known: kernel, embedding, scale, bias"
    )
