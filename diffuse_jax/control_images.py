"""Control images for ControlNets, computed from an image: edges, blur, tile, and the condition for inpainting.

Each takes a PIL image or an array ``[H,W,3]`` or ``[H,W]`` (uint8, or floating point in [0, 1]) and returns an array
that pipelines take as a control image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy import ndimage

from diffuse_jax.utils import load_image

TAN_22 = round((2**0.5 - 1) * 2**15)
"""Tangent of 22.5 degrees in units of ``2**-15``."""


def canny(image: Any, low: float = 100, high: float = 200) -> NDArray[np.uint8]:
    """White edges on black (Canny 1986), pixel for pixel what OpenCV's ``cv2.Canny(image, low, high)`` finds.

    Args:
      image: see the module.
      low: gradient (sum of its two components' sizes) above which an edge continues.
      high: gradient above which an edge begins.

    Returns:
      uint8 ``[H,W,3]``, 0 or 255.
    """
    pixels = np.asarray(load_image(image), np.int32)
    low, high = np.floor(sorted((low, high)))
    dx, dy, strength = _gradient(pixels)
    ridge = _ridges(dx, dy, strength) & (strength > low)
    regions, _ = ndimage.label(ridge, np.ones((3, 3)))
    kept = np.isin(regions, regions[ridge & (strength > high)]) & ridge
    return np.repeat(np.where(kept, 255, 0).astype(np.uint8)[..., None], 3, -1)


def _gradient(pixels: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Sobel derivatives along x and y ``[H,W]`` of the channel where they are largest, and the sum of their sizes."""
    along = lambda axis, weights, a: ndimage.correlate1d(a, weights, axis, mode="nearest")
    dx, dy = (along(1 - axis, [1, 2, 1], along(axis, [-1, 0, 1], pixels)) for axis in (1, 0))
    strength = np.abs(dx) + np.abs(dy)
    strongest = strength.argmax(-1)[..., None]
    dx, dy, strength = (np.take_along_axis(a, strongest, -1)[..., 0] for a in (dx, dy, strength))
    return dx, dy, strength


def _ridges(dx: NDArray[np.int32], dy: NDArray[np.int32], strength: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where the gradient is larger than on both sides of the edge; there is none outside the image."""
    around = np.pad(strength, 1)
    height, width = strength.shape
    at = lambda down, right: around[1 + down : 1 + down + height, 1 + right : 1 + right + width]
    x, y = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << 15
    flat = y < x * TAN_22
    steep = y > x * TAN_22 + (x << 16)  # the tangent of 67.5 degrees is that of 22.5 degrees and two
    falls = (dx ^ dy) < 0
    # Of two equal neighbours along an axis the first one is the ridge; on the diagonals neither is.
    sideways = (strength > at(0, -1)) & (strength >= at(0, 1))
    upright = (strength > at(-1, 0)) & (strength >= at(1, 0))
    down = (strength > at(-1, -1)) & (strength > at(1, 1))
    up = (strength > at(-1, 1)) & (strength > at(1, -1))
    return np.select([flat, steep, falls], [sideways, upright, up], down)


def blur(image: Any, radius: float = 5) -> NDArray[np.uint8]:
    """The image blurred by a Gaussian, for ControlNets that add detail.

    Args:
      image: see the module.
      radius: standard deviation in pixels.

    Returns:
      uint8 ``[H,W,3]``.
    """
    if radius < 0:
        raise ValueError(f"radius must be at least 0 pixels, got {radius}")
    return np.asarray(load_image(image).filter(ImageFilter.GaussianBlur(radius)))


def tile(image: Any, resolution: int = 1024, multiple: int = 64) -> NDArray[np.uint8]:
    """The image resized with Lanczos, for ControlNets that repaint it in more detail.

    Args:
      image: see the module.
      resolution: of the shorter side, in pixels.
      multiple: height and width are rounded to multiples of it.

    Returns:
      uint8 ``[H,W,3]``, with about the aspect ratio of the image.
    """
    if multiple < 1 or resolution < multiple:
        raise ValueError(f"resolution={resolution} must be at least multiple={multiple}, which must be at least 1")
    found = load_image(image)
    width, height = (round(side * resolution / min(found.size) / multiple) * multiple for side in found.size)
    return np.asarray(found.resize((width, height), Image.Resampling.LANCZOS))


def inpaint_condition(image: Any, mask: Any) -> NDArray[np.float32]:
    """The image for a ControlNet for inpainting: -1 where it is to be repainted.

    Args:
      image: see the module.
      mask: likewise, of the same size; what is brighter than one half is repainted.

    Returns:
      float32 ``[H,W,3]``: in [0, 1], and -1 at masked pixels.

    Raises:
      ValueError: the sizes differ.
    """
    pixels, shade = load_image(image), load_image(mask)
    if pixels.size != shade.size:
        shown = " and ".join(f"{i.width}x{i.height}" for i in (pixels, shade))
        raise ValueError(f"image and mask must have the same size, got {shown} (width x height); resize one of them")
    hidden = np.asarray(shade.convert("L"), np.float32) / 255 > 0.5
    return np.where(hidden[..., None], np.float32(-1), np.asarray(pixels, np.float32) / 255)
