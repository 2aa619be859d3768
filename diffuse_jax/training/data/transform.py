"""From an image file and its captions to one training example: decode, resize, crop, mirror, choose a caption.

Every random choice is a function of the seed and of the example's position in the run, so it does not matter which
worker process makes the example, or whether the run was interrupted.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffuse_jax import images
from diffuse_jax.training.data.tags import TagSettings

ORDER, CHOICES, SUBSET, WINDOW, BUCKETS, TAGS, SETS, SIZES = range(8)
"""Purposes of random streams; part of the seed, so that the streams are independent."""

CONDITIONS = ("canny", "blur")
"""Functions of :mod:`diffuse_jax.control_images` that make a control image from an example's pixels alone."""

INTERPOLATIONS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos", "nearest")}

Size = tuple[int, int]
"""Height and width in pixels."""


class Record(NamedTuple):
    """An undecoded row of a data set.

    Attributes:
      image: the bytes of an image file, or its path.
      captions: the captions, of which one is chosen each time.
      name: name in error messages: a path, or a key and the file that contains it.
      conditioning, mask: the control image, and the weights of the pixels in the loss as a grey image, in the same form
        as ``image``; None if there is none.
    """

    image: bytes | str
    captions: tuple[str, ...]
    name: str
    conditioning: bytes | str | None = None
    mask: bytes | str | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """One training example; sizes are (height, width) in pixels.

    Attributes:
      pixels: uint8 ``[h,w,3]``, resized, cropped and mirrored; None with ``pixels=False``, in which case
        ``original_size`` and ``crop_top_left`` are (0, 0).
      caption: the chosen caption, or "" if it was dropped.
      original_size: size of the upright image in the data set.
      crop_top_left: top left of the crop in the resized image, which is mirrored if the example is.
      target_size: size of ``pixels``.
      index: row of the source.
      caption_index: index of the caption among those of the row; -1 if it was dropped.
      name: name in error messages.
      conditioning: the control image, uint8 ``[h,w,3]``, cropped and mirrored like ``pixels``; None if there is none.
      keeps_conditioning: False if the network must do without it this time; None if that never happens in the run.
      mask: the weight of every pixel in the loss, uint8 ``[h,w]``, 255 for the full weight; None if all have it.
    """

    pixels: np.ndarray | None
    caption: str
    original_size: Size
    crop_top_left: Size
    target_size: Size
    index: int
    caption_index: int
    name: str
    conditioning: np.ndarray | None = None
    keeps_conditioning: bool | None = None
    mask: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Transform:
    """Makes examples from records.

    Attributes:
      resolution: the shorter side is resized to this, in pixels (with buckets, the size of the bucket is used instead).
      crop_size: side of the square crop in pixels; ``resolution`` if None.
      center_crop: crop at the centre instead of at random.
      random_flip: mirror each example with probability 1/2.
      interpolation: a key of ``INTERPOLATIONS``.
      empty_share: fraction of captions replaced by "".
      dropout: probability of dropping the caption alone, of dropping the control image alone, and of dropping both
        (Brooks et al. 2023, section 3.2.1); at most 1/3.
      tags: how captions that are lists of tags are changed.
      pixels: False skips reading images, for latents from a cache.
      conditioning: one of ``CONDITIONS``, which makes the control image from the cropped image; None takes that of the
        record.
      seed: seed of all random choices.
    """

    resolution: int
    crop_size: int | None = None
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "bilinear"
    empty_share: float = 0.0
    dropout: float = 0.0
    tags: TagSettings = dataclasses.field(default_factory=TagSettings)
    pixels: bool = True
    conditioning: str | None = None
    seed: int = 0

    def __call__(self, record: Record, index: int, position: int, size: Size | None = None) -> Example:
        """The example at ``position`` of the run.

        Args:
          record: the row ``index`` of the source.
          index: the index of the row.
          position: number of examples of the run before this one.
          size: size of the bucket, if there are buckets.
        """
        u, v, mirrored, which, dropped = np.random.default_rng([self.seed, CHOICES, position]).random(5)
        place = None if self.center_crop else (u, v)
        empty = dropped < max(self.empty_share, 2 * self.dropout)
        number = -1 if empty else int(which * len(record.captions))
        example = self._example(record, index, number, place, self.random_flip and mirrored < 0.5, size)
        changed: dict[str, Any] = {}
        if self.tags.changes:
            rng = np.random.default_rng([self.seed, TAGS, position])
            changed["caption"] = self.tags.arrange(example.caption, rng)
        if self.dropout:
            changed["keeps_conditioning"] = not self.dropout <= dropped < 3 * self.dropout
        return dataclasses.replace(example, **changed) if changed else example

    def fixed(self, record: Record, index: int, size: Size | None = None) -> Example:
        """The example without randomness: the centre crop of the image, not mirrored, with the first caption."""
        return self._example(record, index, 0, None, False, size)

    def _example(
        self, record: Record, index: int, number: int, place: tuple[float, float] | None, flip: bool, size: Size | None
    ) -> Example:
        caption = "" if number < 0 else record.captions[number]
        covered = size or (self.resolution, self.resolution)
        target = size or (self.crop_size or self.resolution,) * 2
        if not self.pixels:
            return Example(None, caption, (0, 0), (0, 0), target, index, number, record.name)
        image = decode(record)
        original = image.height, image.width
        weights = None if record.mask is None else decode_mask(record, image.size)

        def cropped(image: Image.Image) -> tuple[np.ndarray, Size]:
            image = cover(image, covered, self.interpolation)
            top, left = corner((image.height, image.width), target, place)
            pixels = np.asarray(image)[top : top + target[0], left : left + target[1]]
            return (pixels[:, ::-1], (top, image.width - target[1] - left)) if flip else (pixels, (top, left))

        pixels, crop = cropped(image)
        control = None
        if self.conditioning is not None:
            control = condition(self.conditioning, pixels)
        elif record.conditioning is not None:
            control, _ = cropped(decode(Record(record.conditioning, (), f"the control image of {record.name}")))
        mask = None if weights is None else cropped(weights)[0]
        return Example(pixels, caption, original, crop, target, index, number, record.name, control, mask=mask)


def condition(name: str, pixels: np.ndarray) -> np.ndarray:
    """The control image uint8 ``[h,w,3]`` that one of ``CONDITIONS`` makes from an image uint8 ``[h,w,3]``."""
    from diffuse_jax import control_images  # SciPy is slow to import

    return np.asarray(getattr(control_images, name)(np.ascontiguousarray(pixels)))


def decode(record: Record) -> Image.Image:
    """The image, upright and in RGB; see :func:`diffuse_jax.images.rgb`.

    Raises:
      ValueError: it is not an image, is damaged, exceeds Pillow's size limit, or has values of unknown range.
    """
    with images.opened(record.image, record.name) as image:
        return images.rgb(image, record.name)


def decode_mask(record: Record, size: tuple[int, int]) -> Image.Image:
    """The mask of a record, upright and grey.

    Raises:
      ValueError: it does not have the ``size`` of its image, width and height in pixels, or is black everywhere, or as
        for :func:`decode`.
    """
    assert record.mask is not None
    mask = decode(Record(record.mask, (), f"the mask of {record.name}")).convert("L")
    if mask.size != size:
        raise ValueError(
            f"the mask of {record.name} has {mask.width} x {mask.height} pixels, and its image {size[0]} x {size[1]}; "
            "both must have the same size"
        )
    if mask.getextrema() == (0, 0):
        raise ValueError(
            f"the mask of {record.name} is black everywhere, so nothing of the image would count (white does); invert "
            "the mask, or leave the image out"
        )
    return mask


def image_size(record: Record) -> Size:
    """Height and width of the upright image, from the header of the file.

    Raises:
      ValueError: as for :func:`decode`, as far as the header shows it.
    """
    with images.opened(record.image, record.name) as image:
        return images.upright_size(image)


def cover(image: Image.Image, size: Size, interpolation: str = "bilinear") -> Image.Image:
    """Resize to the smallest image that covers ``size``, keeping the aspect ratio; the longer side is rounded down."""
    height, width = size
    if image.height * width <= image.width * height:
        wanted = (image.width * height // image.height, height)
    else:
        wanted = (width, image.height * width // image.width)
    return image if wanted == image.size else image.resize(wanted, INTERPOLATIONS[interpolation])


def corner(size: Size, target: Size, place: tuple[float, float] | None) -> Size:
    """Top and left of a crop of size ``target``: at a relative position in [0, 1)^2, or at the centre if None."""
    room = size[0] - target[0], size[1] - target[1]
    if place is None:
        return round(room[0] / 2), round(room[1] / 2)
    return int(place[0] * (room[0] + 1)), int(place[1] * (room[1] + 1))
