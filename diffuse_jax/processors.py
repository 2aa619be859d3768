"""What turns images into the inputs of vision encoders: numbers from ``preprocessor_config.json``, as frozen data.

``__call__`` works on images in host memory, exactly as transformers does with Pillow. ``on_device`` is the same in JAX
for images that are already on the device; it can be part of a compiled program, and differs by rounding: Pillow also
rounds to 8 bits, and clips, between the passes over rows and columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffuse_jax.allowed import Range
from diffuse_jax.config import Config
from diffuse_jax.images import rgb
from diffuse_jax.weights import WeightsError, read_json, write_json
from diffuse_jax.writing import expanded

FILE = "preprocessor_config.json"

METHODS: Mapping[int, str] = {0: "nearest", 1: "lanczos3", 2: "linear", 3: "cubic"}
"""Pillow's number of a resampling filter -> the same filter in JAX."""

Pixels = Image.Image | np.ndarray
Triple = tuple[float, float, float]
Size = int | tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageProcessor(Config):
    """Resize, crop in the centre, rescale and normalise, each if its switch is on.

    Attributes:
      size: (height, width) to resize to, or the length of the shorter edge, which keeps the aspect ratio.
      resample: Pillow's filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming.
      crop_size: (height, width) of the crop; smaller images get a black margin.
      rescale_factor: what 8-bit values are multiplied by.
      image_mean, image_std: per channel, in units of rescaled values.
    """

    harmless: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("feature_extractor_type", "image_processor_type", "processor_class"), "names a class"),
        **dict.fromkeys(("data_format", "input_data_format", "return_tensors"), "images are channel-last here"),
        "default_to_square": "size says what it means",
    }
    square: ClassVar[bool] = False
    """Whether a single number as ``size`` means both edges, in files that do not say so."""

    do_convert_rgb: bool = True
    do_resize: bool = True
    size: Size = 224
    resample: Annotated[int, Range(0, 5)] = 3
    do_center_crop: bool = True
    crop_size: tuple[int, int] = (224, 224)
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Triple = (0.5, 0.5, 0.5)
    image_std: Triple = (0.5, 0.5, 0.5)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The object of the file; sizes are numbers, or objects with ``shortest_edge`` or ``height`` and ``width``."""
        square = data.get("default_to_square", cls.square)
        read = {"size": lambda x: edges(x, bool(square)), "crop_size": lambda x: edges(x, True)}
        return super().from_json({key: read.get(key, lambda x: x)(value) for key, value in data.items()})

    def to_json(self) -> dict[str, Any]:
        size = {"shortest_edge": self.size} if isinstance(self.size, int) else named(self.size)
        found = super().to_json() | {"size": size, "image_processor_type": type(self).__name__}
        return found | ({"crop_size": named(self.crop_size)} if "crop_size" in found else {})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read ``preprocessor_config.json`` from a local folder.

        Raises:
          WeightsError: the file is missing or malformed, or has values that are refused.
        """
        file = expanded(folder) / FILE
        data = read_json(file)
        try:
            return cls.from_json(data)
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{file}: not a config of {cls.__name__}: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``preprocessor_config.json``, which transformers opens."""
        write_json(expanded(folder) / FILE, self.to_json())

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The size, (height, width), that an image is resized to."""
        if isinstance(self.size, tuple):
            return self.size
        short, long = min(height, width), max(height, width)
        other = self.size * long // short
        return (other, self.size) if width <= height else (self.size, other)

    def __call__(self, images: Pixels | Sequence[Pixels]) -> np.ndarray:
        """Images -> ``pixel_values [B,H,W,3]`` float32.

        Args:
          images: one or several, each a Pillow image of any mode or a uint8 array ``[H,W,3]``; also ``[B,H,W,3]``.

        Raises:
          ValueError: another kind of image, or images that end up with different sizes.
        """
        if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
            images = [images]
        found = [self._process(image) for image in images]
        if len({x.shape for x in found}) != 1:
            raise ValueError(f"the images have different sizes, or there are none: {sorted({x.shape for x in found})}")
        return np.stack(found)

    def on_device(self, images: jax.Array) -> jax.Array:
        """The same for images ``[B,H,W,3]`` in [0, 1] on the device, rounded to 8 bits: ``[B,H',W',3]`` float32.

        Raises:
          ValueError: the filter is one that JAX does not have.
        """
        x = jnp.round(jnp.clip(jnp.asarray(images, jnp.float32), 0, 1) * 255)
        if self.do_resize:
            if self.resample not in METHODS:
                raise ValueError(f"resample={self.resample} cannot run on the device, only {sorted(METHODS)}")
            shape = (x.shape[0], *self.resized(*x.shape[1:3]), x.shape[3])
            x = jnp.round(jnp.clip(jax.image.resize(x, shape, METHODS[self.resample]), 0, 255))
        x = jnp.pad(x, ((0, 0), *self._margins(*x.shape[1:3]), (0, 0)))
        (top, height), (left, width) = self._window(*x.shape[1:3])
        x = x[:, top : top + height, left : left + width]
        x = x * self.rescale_factor if self.do_rescale else x
        mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, -1) for v in (self.image_mean, self.image_std))
        return (x - mean) / std if self.do_normalize else x

    def _process(self, image: Pixels) -> np.ndarray:
        x = pixels(image)
        if self.do_resize:
            height, width = self.resized(*x.shape[:2])
            x = np.asarray(Image.fromarray(x).resize((width, height), resample=Image.Resampling(self.resample)))
        x = np.pad(x, (*self._margins(*x.shape[:2]), (0, 0)))
        (top, height), (left, width) = self._window(*x.shape[:2])
        y = x[top : top + height, left : left + width]
        z = (y.astype(np.float64) * self.rescale_factor if self.do_rescale else y).astype(np.float32)
        mean, std = (np.asarray(v, np.float32) for v in (self.image_mean, self.image_std))
        return (z - mean) / std if self.do_normalize else z

    def _margins(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Zeros before and after the rows and the columns of an image that is smaller than the crop."""
        if not self.do_center_crop:
            return (0, 0), (0, 0)
        missing = [max(crop - edge, 0) for crop, edge in zip(self.crop_size, (height, width), strict=True)]
        rows, columns = ((math.ceil(n / 2), n // 2) for n in missing)
        return rows, columns

    def _window(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """First row and number of rows of the crop, then the same of columns."""
        if not self.do_center_crop:
            return (0, height), (0, width)
        rows, columns = self.crop_size
        return ((height - rows) // 2, rows), ((width - columns) // 2, columns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPImageProcessor(ImageProcessor):
    """The image processor of CLIP's vision encoders; the defaults are those of transformers."""

    image_mean: Triple = (0.48145466, 0.4578275, 0.40821073)
    image_std: Triple = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPTImageProcessor(ImageProcessor):
    """The image processor of depth estimators; there is no crop, so sizes come from resizing alone.

    Attributes:
      keep_aspect_ratio: the edge that needs the smaller change decides how both are scaled.
      ensure_multiple_of: what both edges are rounded to.
    """

    fixed: ClassVar[Mapping[str, Any]] = {"do_pad": False}
    harmless: ClassVar[Mapping[str, str]] = {
        **ImageProcessor.harmless,
        **dict.fromkeys(("pad_size", "size_divisor"), "of do_pad"),
        "do_reduce_labels": "for training segmentation",
    }
    square: ClassVar[bool] = True

    size: Size = (384, 384)
    do_center_crop: bool = False
    keep_aspect_ratio: bool = False
    ensure_multiple_of: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.size, int) or self.do_center_crop:
            raise ValueError(
                f"DPTImageProcessor: size must be a height and a width, without a crop, got size={self.size}, "
                f"do_center_crop={self.do_center_crop}"
            )

    def resized(self, height: int, width: int) -> tuple[int, int]:
        assert isinstance(self.size, tuple)
        rows, columns = self.size[0] / height, self.size[1] / width
        if self.keep_aspect_ratio:
            rows = columns = columns if abs(1 - columns) < abs(1 - rows) else rows
        step = self.ensure_multiple_of
        edge = lambda scaled: max(round(scaled / step), 1) * step
        return edge(rows * height), edge(columns * width)


def pixels(image: Pixels) -> np.ndarray:
    """An image as uint8 ``[H,W,3]``.

    Raises:
      ValueError: an array of another kind.
    """
    if isinstance(image, Image.Image):
        return np.asarray(rgb(image, "image"))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        shown = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"an image must be a Pillow image or a uint8 array [H,W,3], got {shown}")
    return image


def edges(size: Any, square: bool) -> Any:
    """A size of a file as a number (the shorter edge) or (height, width); what it does not know is returned."""
    if isinstance(size, Mapping):
        if "shortest_edge" in size and len(size) == 1:
            return size["shortest_edge"]
        return (size["height"], size["width"]) if {*size} == {"height", "width"} else dict(size)
    return (size, size) if square and isinstance(size, int) else size


def named(size: tuple[int, int]) -> dict[str, int]:
    """(height, width) as files have it."""
    return dict(zip(("height", "width"), size, strict=True))
