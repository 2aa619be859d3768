"""Smooth resampling of feature maps: by PyTorch's conventions, as two small matrix products; by two, with a filter."""

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


def smooth_down(x: jax.Array) -> jax.Array:
    """``[B,H,W,C] -> [B,H/2,W/2,C]`` through the binomial filter (1, 3, 3, 1) / 8 of each axis (Zhang 2019,
    1904.11486); pixels outside are zeros, ``H`` and ``W`` must be even."""
    for axis in (1, 2):
        edges = [(1, 1) if k == axis else (0, 0) for k in range(4)]
        padded, n = jnp.pad(x, edges), x.shape[axis]
        before, near, here, beyond = (jax.lax.slice_in_dim(padded, k, k + n - 1, 2, axis) for k in range(4))
        x = (before + 3 * near + 3 * here + beyond) / 8
    return x


def smooth_up(x: jax.Array) -> jax.Array:
    """``[B,H,W,C] -> [B,2 H,2 W,C]``, the transpose of :func:`smooth_down` times four: a new pixel is three parts of
    the old pixel that it lies in and one part of the next one; pixels outside are zeros."""
    for axis in (1, 2):
        edges = [(1, 1) if k == axis else (0, 0) for k in range(4)]
        padded, n = jnp.pad(x, edges), x.shape[axis]
        before, after = (jax.lax.slice_in_dim(padded, k, k + n, 1, axis) for k in (0, 2))
        pairs = jnp.stack([(3 * x + before) / 4, (3 * x + after) / 4], axis + 1)
        x = pairs.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
    return x
