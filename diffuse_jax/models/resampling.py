"""Smooth resampling of feature maps by PyTorch's conventions, as two small matrix products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.interpolation import antialiased_weights, weights


def bilinear(x: jax.Array, size: tuple[int, int], *, align_corners: bool = False) -> jax.Array:
    """``[B,H,W,C] -> [B,*size,C]``, linear between pixels, without smoothing first.

    ``align_corners``: the outermost pixels keep their place, rather than the outer edges of the image.
    """
    return _resample(x, size, align_corners, cubic=False)


def bicubic(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """``[B,H,W,C] -> [B,*size,C]`` by cubic convolution with a = -0.75 (Keys 1981), as PyTorch has it."""
    return _resample(x, size, align_corners=False, cubic=True)


def bicubic_antialiased(x: jax.Array, size: tuple[int, int], *, align_corners: bool = True) -> jax.Array:
    """``[B,H,W,C] -> [B,*size,C]``, cubic, smoothed where pixels become fewer; see
    :func:`~diffuse_jax.interpolation.antialiased_weights`."""
    pairs = zip(x.shape[1:3], size, strict=True)
    return _apply(x, *(antialiased_weights(old, new, align_corners=align_corners) for old, new in pairs))


def _resample(x: jax.Array, size: tuple[int, int], align_corners: bool, cubic: bool) -> jax.Array:
    pairs = zip(x.shape[1:3], size, strict=True)
    return _apply(x, *(weights(old, new, cubic=cubic, align_corners=align_corners) for old, new in pairs))


def _apply(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    y = jnp.einsum("Hh,bhwc->bHwc", rows, x.astype(jnp.float32), precision="highest")
    return jnp.einsum("Ww,bhwc->bhWc", columns, y, precision="highest").astype(x.dtype)
