"""Interpolation between pixels by PyTorch's conventions, as matrices. This module loads no JAX."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray


@functools.lru_cache(maxsize=256)
def weights(old: int, new: int, *, cubic: bool, align_corners: bool = False) -> NDArray[np.float32]:
    """The weight of each of ``old`` pixels in each of ``new`` ones, ``[new, old]`` float32; rows add up to one.

    Outside the image its outermost pixel is repeated.

    Args:
      old, new: numbers of pixels.
      cubic: by cubic convolution with a = -0.75 (Keys 1981), otherwise linear.
      align_corners: the outermost pixels keep their place, rather than the outer edges of the image.
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


@functools.lru_cache(maxsize=256)
def antialiased_weights(old: int, new: int, *, align_corners: bool = True) -> NDArray[np.float32]:
    """The same for PyTorch's cubic interpolation with ``antialias``, ``[new, old]`` float32.

    The kernel has a = -0.5 and is widened where pixels become fewer. Pixels outside the image count for nothing; with
    ``align_corners`` these only determine the distance between pixels, and their centres stay those of pixels.
    """
    between = (old - 1) / (new - 1) if new > 1 else 0.0
    scale = between if align_corners else old / new
    width = max(scale, 1.0)
    centre = (np.arange(new, dtype=np.float64)[:, None] + 0.5) * scale
    source = np.arange(old)
    inside = (source >= np.trunc(np.maximum(centre - 2 * width + 0.5, 0))) & (
        source < np.trunc(centre + 2 * width + 0.5)
    )
    matrix = np.where(inside, _cubic(np.abs(source - centre + 0.5) / width, a=-0.5), 0.0)
    return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)


def _cubic(distance: NDArray[np.float64], a: float = -0.75) -> NDArray[np.float64]:
    """The kernel of cubic convolution for distances from 0 to 2 (Keys 1981, equation 15)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


def query_grid(height: int, width: int, queries: int) -> tuple[int, int]:
    """Rows and columns of a layer's queries for a mask ``[height,width]``; they are ``queries`` in all only if the
    layer has the mask's aspect ratio."""
    rows = max(int(math.sqrt(queries / (width / height))), 1)
    rows += queries % rows != 0
    return rows, queries // rows
