"""An estimate of the size of a JPEG file that JAX can differentiate, as a reward: the smaller, the better.

    python train/reward.py --method draft --reward train/emoji/jpeg_reward.py:compressibility ...

A JPEG encoder takes the cosine transform of blocks of eight by eight pixels, divides the coefficients by a step and
rounds them; a coefficient of ``n`` steps costs about ``log2(1 + n)`` bits. Rounding, whose gradient is zero, is left
out.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK, STEP = 8, 4.0
"""Pixels of a block, and the step in units of 1/255, about that of quality 95."""
YCBCR = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]], np.float32)
"""Of JFIF: luma and two colour differences from red, green and blue."""


def compressibility(images: jax.Array, prompts: Any) -> jax.Array:
    """Minus the estimated size of images float32 ``[B,H,W,3]`` in [0, 1], in 1000 bytes, ``[B]``.

    Raises:
      ValueError: the sides are not multiples of 16.
    """
    height, width = images.shape[1:3]
    if height % (2 * BLOCK) or width % (2 * BLOCK):
        raise ValueError(f"height and width of the images must be multiples of {2 * BLOCK}, got {height} and {width}")
    planes = 255 * jnp.einsum("bhwc,dc->bhwd", images, YCBCR)
    bits = block_bits(planes[..., 0])
    for colour in (planes[..., 1], planes[..., 2]):  # at half the resolution, as encoders store them
        batch = len(colour)
        bits += block_bits(colour.reshape(batch, height // 2, 2, width // 2, 2).mean((2, 4)))
    return -bits / 8000


def block_bits(plane: jax.Array) -> jax.Array:
    """Estimated bits of planes ``[B,H,W]``, ``[B]``."""
    batch, height, width = plane.shape
    blocks = plane.reshape(batch, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    coefficients = jnp.einsum("byixj,ui,vj->byxuv", blocks, cosines(), cosines()) / STEP
    cost = jnp.log2(1 + jnp.abs(coefficients))
    return cost.sum((1, 2, 3, 4)) - cost[..., 0, 0].sum((1, 2))  # the means of the blocks cost little


def cosines() -> np.ndarray:
    """The orthonormal cosine transform (DCT-II), float32 ``[frequency, pixel]``."""
    k, n = np.arange(BLOCK)[:, None], np.arange(BLOCK)
    return (np.where(k, 2, 1) / BLOCK) ** 0.5 * np.cos(np.pi * (2 * n + 1) * k / (2 * BLOCK)).astype(np.float32)
