"""Images of random size: made smaller and placed on a grey canvas, or enlarged and cropped (Kumari et al. 2023).

The caption says that the subject is far away or close up, so that a model that learns it from a few images does not
learn its size with it. What a smaller image leaves grey has no weight in the loss.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from diffuse_jax.training.data.transform import SIZES, Example, Record, Size, Transform

SMALLER, SHARE_SMALLER = (1 / 3, 1.0), 0.66
LARGER = (1.2, 1.4)
"""Ranges of the factor on the sides, and how often it is of the first."""

FAR = 0.6
"""Below this factor, the caption says so."""

FAR_AWAY, CLOSE_UP = ("a far away ", "very small "), ("zoomed in ", "close up ")
"""What captions of small and of enlarged images begin with; one of each is chosen."""

GREY = 128
"""The value of the canvas, nearly 0 in [-1, 1]."""


@dataclasses.dataclass(frozen=True)
class Rescaled:
    """Another transform whose images get a random size.

    Attributes:
      transform: makes the images, of any size.
      cell: number of pixels per side of a latent. On a canvas, a latent counts if its image covers it and its
        neighbours, which the autoencoder mixes into it.
    """

    transform: Transform
    cell: int

    def __call__(self, record: Record, index: int, position: int, size: Size | None = None) -> Example:
        """The example at ``position`` of the run, as for ``transform``, with a mask."""
        which, amount, down, right, word = np.random.default_rng([self.transform.seed, SIZES, position]).random(5)
        canvas = size or (self.transform.crop_size or self.transform.resolution,) * 2
        low, high = SMALLER if which < SHARE_SMALLER else LARGER
        low = min(high, max(low, 4 * self.cell / min(canvas)))  # smaller ones would not count at all
        factor = low + amount * (high - low)
        whole = math.floor if factor <= 1 else math.ceil
        sides = whole(canvas[0] * factor), whole(canvas[1] * factor)
        example = self.transform(record, index, position, sides)
        top, left = (int(u * (abs(a - b) + 1)) for u, a, b in zip((down, right), canvas, sides, strict=True))
        words = FAR_AWAY if factor < FAR else CLOSE_UP if factor > 1 else ("",)
        caption = example.caption and words[int(word * len(words))] + example.caption
        pixels, mask = placed(np.asarray(example.pixels), canvas, (top, left), self.cell)
        return dataclasses.replace(example, pixels=pixels, mask=mask, caption=caption, target_size=canvas)

    def fixed(self, record: Record, index: int, size: Size | None = None) -> Example:
        """The example without randomness, of its own size."""
        return self.transform.fixed(record, index, size)


def placed(image: np.ndarray, canvas: Size, corner: Size, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of the size of a canvas, and its mask.

    Args:
      image: uint8 ``[h,w,3]``, smaller than the canvas or larger.
      canvas: height and width of the result.
      corner: where a smaller image is on the canvas, or the crop of a larger one in it; top and left in pixels.
      cell: see :class:`Rescaled`.

    Returns:
      The pixels uint8 ``[H,W,3]``, and their weights uint8 ``[H,W]``, 0 or 255.
    """
    (height, width), (top, left) = canvas, corner
    if image.shape[0] >= height:
        return image[top : top + height, left : left + width], np.full(canvas, 255, np.uint8)
    pixels = np.full((height, width, 3), GREY, np.uint8)
    pixels[top : top + image.shape[0], left : left + image.shape[1]] = image
    rows, columns = (
        slice(cell * (-(-at // cell) + 1), cell * ((at + side) // cell - 1)) for at, side in zip(corner, image.shape)
    )
    mask = np.zeros(canvas, np.uint8)
    mask[rows, columns] = 255
    return pixels, mask
