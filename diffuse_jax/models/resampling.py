"""Smooth resampling of feature maps by PyTorch's conventions, as two small matrix products."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffuse_jax.interpolation import weights


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
        jnp.asarray(weights(old, new, cubic=cubic, align_corners=align_corners))
        for old, new in zip(x.shape[1:3], size, strict=True)
    )
    y = jnp.einsum("Hh,bhwc->bHwc", rows, x.astype(jnp.float32), precision="highest")
    return jnp.einsum("Ww,bhwc->bhWc", columns, y, precision="highest").astype(x.dtype)
