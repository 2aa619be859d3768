"""From an encoded picture and its captions to one training example: decode, resize, crop, mirror, draw a caption.

Every random choice is a function of the seed and of the example's position in the run, so it does not matter which
worker process makes the example, or whether the run was interrupted in between.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from PIL import Image

from diffuse_jax import images

ORDER, CHOICES, SUBSET, WINDOW, BUCKETS = range(5)
"""What a stream of random numbers is for; part of its seed, so that the streams are independent."""

INTERPOLATIONS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos", "nearest")}

Size = tuple[int, int]
"""Height and width in pixels."""


class Record(NamedTuple):
    """A row of a data set, not decoded yet.

    Attributes:
      image: the bytes of a picture file, or the path of one.
      captions: its captions; one of them is drawn each time.
      name: what an error message calls it: a path, or a key and the file that holds it.
    """

    image: bytes | str
    captions: tuple[str, ...]
    name: str


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture as a batch will hold it; sizes are (height, width) in pixels.

    Attributes:
      pixels: uint8 ``[h,w,3]``, resized, cut and mirrored; None where ``pixels=False`` was asked for, and then the two
        sizes below are (0, 0).
      caption: the caption drawn, or "" where it was dropped.
      original_size: of the picture in the data set, upright.
      crop_top_left: where the cut begins in the resized picture, mirrored if the example is.
      target_size: of ``pixels``.
      index: row of the source.
      caption_index: which of the row's captions it is; -1 where it was dropped.
      name: what an error message calls it.
    """

    pixels: np.ndarray | None
    caption: str
    original_size: Size
    crop_top_left: Size
    target_size: Size
    index: int
    caption_index: int
    name: str


@dataclasses.dataclass(frozen=True)
class Transform:
    """How examples are made from records.

    Attributes:
      resolution: the shorter side is resized to this (a bucket's size decides instead, where there are buckets).
      crop_size: side of the square that is cut out; ``resolution`` if None.
      center_crop: cut in the middle instead of a random place.
      random_flip: mirror half of the examples.
      interpolation: a key of ``INTERPOLATIONS``.
      empty_share: share of the captions replaced by "".
      pixels: False leaves pictures unread, where latents come from a cache.
      seed: of all random choices.
    """

    resolution: int
    crop_size: int | None = None
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "bilinear"
    empty_share: float = 0.0
    pixels: bool = True
    seed: int = 0

    def __call__(self, record: Record, index: int, position: int, size: Size | None = None) -> Example:
        """The example at ``position`` of the run.

        Args:
          record: what the source holds at ``index``.
          index: its row.
          position: how many examples of the run come before it.
          size: the size of its bucket, if there are buckets.
        """
        u, v, mirrored, which, dropped = np.random.default_rng([self.seed, CHOICES, position]).random(5)
        place = None if self.center_crop else (u, v)
        number = -1 if dropped < self.empty_share else int(which * len(record.captions))
        return self._example(record, index, number, place, self.random_flip and mirrored < 0.5, size)

    def fixed(self, record: Record, index: int, size: Size | None = None) -> Example:
        """The example without chance: the middle of the picture, not mirrored, with the first caption."""
        return self._example(record, index, 0, None, False, size)

    def _example(
        self, record: Record, index: int, number: int, place: tuple[float, float] | None, flip: bool, size: Size | None
    ) -> Example:
        caption = "" if number < 0 else record.captions[number]
        covered = size or (self.resolution, self.resolution)
        target = size or (self.crop_size or self.resolution,) * 2
        if not self.pixels:
            return Example(None, caption, (0, 0), (0, 0), target, index, number, record.name)
        picture = decode(record)
        original = picture.height, picture.width
        picture = cover(picture, covered, self.interpolation)
        top, left = corner((picture.height, picture.width), target, place)
        pixels = np.asarray(picture)[top : top + target[0], left : left + target[1]]
        if flip:
            pixels, left = pixels[:, ::-1], picture.width - target[1] - left
        return Example(pixels, caption, original, (top, left), target, index, number, record.name)


def decode(record: Record) -> Image.Image:
    """The picture, upright and in RGB; see :func:`diffuse_jax.images.rgb`.

    Raises:
      ValueError: it is no picture, a damaged one, larger than Pillow thinks safe, or has values of unknown range.
    """
    with images.opened(record.image, record.name) as picture:
        return images.rgb(picture, record.name)


def picture_size(record: Record) -> Size:
    """Height and width of the upright picture, from the head of the file.

    Raises:
      ValueError: as :func:`decode`, of what the head says.
    """
    with images.opened(record.image, record.name) as picture:
        return images.upright_size(picture)


def cover(picture: Image.Image, size: Size, interpolation: str = "bilinear") -> Image.Image:
    """Resize, keeping proportions, to the smallest picture that covers ``size``; the longer side is rounded down."""
    height, width = size
    if picture.height * width <= picture.width * height:
        wanted = (picture.width * height // picture.height, height)
    else:
        wanted = (width, picture.height * width // picture.width)
    return picture if wanted == picture.size else picture.resize(wanted, INTERPOLATIONS[interpolation])


def corner(size: Size, target: Size, place: tuple[float, float] | None) -> Size:
    """Top and left of a cut of ``target``: at a place in [0, 1)^2, or in the middle."""
    room = size[0] - target[0], size[1] - target[1]
    if place is None:
        return round(room[0] / 2), round(room[1] / 2)
    return int(place[0] * (room[0] + 1)), int(place[1] * (room[1] + 1))
