"""Smooth resampling of feature maps by PyTorch's conventions, as two small matrix products."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


def bilinear(x: jax.Array, size: tuple[int, int], *, align_corners: bool = False) -> jax.Array:
    """``[B,H,W,C] -> [B,*size,C]``, linear between pixels, without smoothing first.

    ``align_corners``: the outermost pixels keep their place, rather than the outer edges of the image.
    """
    return _resample(x, size, align_corners, cubic=False)


def bicubic(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """``[B,H,W,C] -> [B,*size,C]`` by cubic convolution with a = -0.75 (Keys 1981), as PyTorch has it."""
    return _resample(x, size, align_corners=False, cubic=True)


def _resample(x: jax.Array, size: tuple[int, int], align_corners: bool, cubic: bool) -> jax.Array:
    rows, columns = (
        jnp.asarray(weights(old, new, align_corners, cubic)) for old, new in zip(x.shape[1:3], size, strict=True)
    )
    y = jnp.einsum("Hh,bhwc->bHwc", rows, x.astype(jnp.float32), precision="highest")
    return jnp.einsum("Ww,bhwc->bhWc", columns, y, precision="highest").astype(x.dtype)


@functools.lru_cache(maxsize=64)
def weights(old: int, new: int, align_corners: bool, cubic: bool) -> np.ndarray:
    """The weight of each of ``old`` pixels in each of ``new`` ones, ``[new, old]`` float32; rows add up to one.

    Outside the image its outermost pixel is repeated.
    """
    i = np.arange(new, dtype=np.float64)
    at = i * (old - 1) / max(new - 1, 1) if align_corners else (i + 0.5) * old / new - 0.5
    at = at if cubic else np.maximum(at, 0)
    matrix = np.zeros((new, old))
    reach = 2 if cubic else 1
    for step in range(1 - reach, 1 + reach):
        source = np.floor(at).astype(int) + step
        share = _cubic(np.abs(at - source)) if cubic else np.maximum(1 - np.abs(at - source), 0)
        np.add.at(matrix, (np.arange(new), np.clip(source, 0, old - 1)), share)
    return matrix.astype(np.float32)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """The kernel of cubic convolution for distances from 0 to 2 (Keys 1981, equation 15)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
