"""Inpainting a region at full size, and putting what was repainted back into the image, on the host."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffuse_jax import fitting
from diffuse_jax.images import rgb
from diffuse_jax.pipelines.inputs import ImageInput, image_list


@dataclasses.dataclass(frozen=True)
class Region:
    """The part of an image that is repainted; the ``finish`` of a request.

    Attributes:
      image, mask: PIL images of one size.
      box: the region in them.
    """

    image: Image.Image
    mask: Image.Image
    box: fitting.Box

    def cut(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """The region of an image (the original, the mask, a control image), scaled to fill (height, width)."""
        return fitting.resize(image.crop(self.box), *size, "fill")

    def __call__(self, images: list[Image.Image]) -> list[Image.Image]:
        """The repainted regions, each put back into the original."""
        return [fitting.overlay(image, self.mask, self.image, self.box) for image in images]


def kind(image: Any) -> str:
    """The size of a PIL image, width x height, or what else something is."""
    return f"{image.width}x{image.height}" if isinstance(image, Image.Image) else type(image).__name__


def region(image: Any, mask: Any, size: tuple[int, int], pad: int, output_type: str) -> Region:
    """The region around a mask's white part, with the aspect ratio of ``size``, (height, width).

    Raises:
      ValueError: image and mask are not PIL images of one size, the padding is negative, the mask is black, or the
        output is not "pil".
    """
    if not isinstance(image, Image.Image) or not isinstance(mask, Image.Image) or image.size != mask.size:
        kinds = " and ".join(
            f"{x.width}x{x.height}" if hasattr(x, "width") else type(x).__name__ for x in (image, mask)
        )
        raise ValueError(f"padding_mask_crop takes one PIL image and one PIL mask of the same size, got {kinds}")
    if output_type != "pil":
        raise ValueError(f'padding_mask_crop puts PIL images together; it needs output_type="pil", got {output_type!r}')
    if pad < 0:
        raise ValueError(f"padding_mask_crop must be a number of pixels of at least 0, got {pad!r}")
    return Region(rgb(image, "image"), mask, fitting.crop_region(mask, *size, pad))


def cut_control_images(cut: Region, images: ImageInput, size: tuple[int, int]) -> list[Any]:
    """The region of control images, which must be PIL images of the original's size.

    Raises:
      ValueError: one is not.
    """
    found = image_list(images, "control image")
    if wrong := [x for x in found if not isinstance(x, Image.Image) or x.size != cut.image.size]:
        want = f"PIL images of {kind(cut.image)}, as image is"
        raise ValueError(f"with padding_mask_crop control images must be {want}; got {kind(wrong[0])}")
    return [cut.cut(x, size) for x in found]


@dataclasses.dataclass(frozen=True)
class PasteBack:
    """Puts the original back where a mask is not white; the ``finish`` of a request.

    Attributes:
      originals: float32 ``[B,H,W,3]`` in [0, 1].
      shades: of the masks, float32 ``[B,H,W,1]`` in [0, 1].
    """

    originals: np.ndarray
    shades: np.ndarray

    def __call__(self, images: Any) -> Any:
        """The images, a list of PIL images or float32 ``[B,H,W,3]``, with the original where the mask is black."""
        if isinstance(images, list):
            painted = np.stack([np.asarray(image) for image in images])
            known = np.round(self.originals * 255)
            return [Image.fromarray(image) for image in np.round(self._mixed(painted, known)).astype(np.uint8)]
        return self._mixed(images, self.originals)

    def _mixed(self, painted: Any, known: np.ndarray) -> Any:
        """Exactly one of the two where the mask is black or white."""
        shades = self.shades
        mixture = shades * painted + (1 - shades) * known
        where = jnp.where if isinstance(painted, jax.Array) else np.where
        return where(shades == 0, known, where(shades == 1, painted, mixture))
