"""Bring images and masks to the size of a request, exactly as PyTorch diffusers' ``VaeImageProcessor``: resize
modes, the region around a mask (its ``padding_mask_crop``), blurred masks, a repainted region put back, and masks for
attention."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from diffuse_jax.interpolation import at_queries, query_grid
from diffuse_jax.messages import warn

RESAMPLE = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}

MODES = ("default", "fill", "crop")

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, as Pillow has it."""


def resize(image: Any, height: int, width: int, mode: str = "default", *, resample: str = "lanczos") -> Any:
    """An image of another size.

    Args:
      image: a PIL image, or an array ``[H,W]``, ``[H,W,C]`` or ``[B,H,W,C]``.
      height, width: in pixels.
      mode: "default" stretches it; "crop" keeps its aspect ratio and cuts off what is too much on both sides; "fill"
        keeps it too and repeats the outermost pixels on the sides where something is missing.
      resample: one of :data:`RESAMPLE`; arrays take the nearest pixel, as PyTorch's ``interpolate`` does.

    Returns:
      A PIL image for one (of mode L if it was, else RGB, for "fill" and "crop"), an array of its dtype for an array.

    Raises:
      ValueError: a size below 1, an unknown mode or filter, or an array with a mode other than "default".
      TypeError: it is not an image.
    """
    if mode not in MODES or resample not in RESAMPLE:
        name, value, known = ("mode", mode, MODES) if mode not in MODES else ("resample", resample, tuple(RESAMPLE))
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if height < 1 or width < 1:
        raise ValueError(f"the size must be at least 1x1 pixels, got {height}x{width}")
    if isinstance(image, Image.Image):
        if mode == "default":
            return image.resize((width, height), RESAMPLE[resample])
        return _framed(image, height, width, mode, RESAMPLE[resample])
    if not hasattr(image, "ndim") or image.ndim not in (2, 3, 4):
        raise TypeError(f"resize takes a PIL image or an array [H,W], [H,W,C] or [B,H,W,C], got {type(image).__name__}")
    if mode != "default":
        raise ValueError(f"mode={mode!r} takes a PIL image, got an array; convert it with Image.fromarray")
    array = np.asarray(image)
    axis = 1 if array.ndim == 4 else 0
    rows, columns = (_nearest(*sizes) for sizes in zip(array.shape[axis : axis + 2], (height, width), strict=True))
    return array.take(rows, axis).take(columns, axis + 1)


def _nearest(given: int, wanted: int) -> NDArray[np.int_]:
    """The pixel that each one of ``wanted`` comes from."""
    step = np.float32(given) / np.float32(wanted)
    return np.minimum(np.floor(np.arange(wanted, dtype=np.float32) * step).astype(int), given - 1)


def _framed(image: Image.Image, height: int, width: int, mode: str, resample: Image.Resampling) -> Image.Image:
    """The image with its aspect ratio kept, in the middle of one of another size."""
    wanted, given = width / height, image.width / image.height
    if wanted < given if mode == "fill" else wanted > given:
        size = width, max(image.height * width // image.width, 1)
    else:
        size = max(image.width * height // image.height, 1), height
    fitted = image.resize(size, resample)
    left, top = width // 2 - size[0] // 2, height // 2 - size[1] // 2
    frame = Image.new("L" if image.mode == "L" else "RGB", (width, height))
    frame.paste(fitted, (left, top))
    if mode == "fill":
        # An edge is a box without height or width, which Pillow's filter reads a few pixels around.
        if top > 0:
            for y, edge in ((0, 0), (top + size[1], size[1])):
                frame.paste(fitted.resize((width, top), box=(0, edge, width, edge)), (0, y))
        if left > 0:
            for x, edge in ((0, 0), (left + size[0], size[0])):
                frame.paste(fitted.resize((left, height), box=(edge, 0, edge, height)), (x, 0))
    return frame


# Inpainting


def blur_mask(mask: Image.Image, factor: float = 4) -> Image.Image:
    """The mask with soft edges, which are blended with the image around them.

    Args:
      mask: a PIL image.
      factor: standard deviation of the Gaussian in pixels.

    Raises:
      ValueError: the factor is negative.
    """
    if factor < 0:
        raise ValueError(f"factor must be at least 0 pixels, got {factor}")
    return mask.filter(ImageFilter.GaussianBlur(factor))


def crop_region(mask: Image.Image, height: int, width: int, pad: int = 0) -> Box:
    """The smallest region around the white part of a mask that has the aspect ratio of the request, as far as the image
    allows; to be cropped, repainted at full resolution, and put back with :func:`overlay`.

    Args:
      mask: a PIL image; what is not black is repainted.
      height, width: of the request.
      pad: pixels around the white part.

    Returns:
      A box for ``Image.crop``.

    Raises:
      ValueError: the mask is black, the size below 1 or the padding negative.
    """
    if height < 1 or width < 1 or pad < 0:
        raise ValueError(f"the size must be at least 1x1 pixels and pad at least 0, got {height}x{width} and {pad}")
    grey = mask.convert("L")
    found = grey.getbbox()
    if found is None:
        raise ValueError("the mask is black: there is nothing to crop to")
    left, top, right, bottom = found
    left, top = max(left - pad, 0), max(top - pad, 0)
    right, bottom = min(right + pad, grey.width), min(bottom + pad, grey.height)
    ratio = width / height
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _grown(top, bottom, (right - left) / ratio, grey.height)
    else:
        left, right = _grown(left, right, (bottom - top) * ratio, grey.width)
    return left, top, right, bottom


def _grown(start: int, end: int, length: float, limit: int) -> tuple[int, int]:
    """An interval grown around its middle to a length, and moved and cut to lie in ``[0, limit]``."""
    more = int(length - (end - start))
    start, end = start - more // 2, end + more - more // 2
    start, end = start - max(end - limit, 0), min(end, limit)
    return max(start, 0), min(end - min(start, 0), limit)


def extend(
    image: Image.Image, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0, overlap: int = 0
) -> tuple[Image.Image, Image.Image]:
    """A larger canvas with the image on it, and the mask of what is new, for outpainting.

    Args:
      image: a PIL image.
      left, top, right, bottom: pixels to add on each side; filled with the image's outermost pixels.
      overlap: repaint so many pixels of the image too, along the sides that are extended.

    Returns:
      ``(canvas, mask)``: an RGB image, and an L image that is white where to paint.

    Raises:
      ValueError: a number is negative, nothing is added, or the overlap leaves nothing of the image.
    """
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    if min(*sides.values(), overlap) < 0 or not any(sides.values()):
        shown = ", ".join(f"{name}={value}" for name, value in {**sides, "overlap": overlap}.items())
        raise ValueError(f"give at least one side to extend, and no negative numbers, got {shown}")
    kept = [
        overlap if left else 0,
        overlap if top else 0,
        image.width - (overlap if right else 0),
        image.height - (overlap if bottom else 0),
    ]
    if kept[0] >= kept[2] or kept[1] >= kept[3]:
        raise ValueError(f"an overlap of {overlap} leaves nothing of an image of {image.width}x{image.height}")
    pixels = np.asarray(image.convert("RGB"))
    canvas = np.pad(pixels, ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = np.full(canvas.shape[:2], 255, np.uint8)
    mask[top + kept[1] : top + kept[3], left + kept[0] : left + kept[2]] = 0
    return Image.fromarray(canvas), Image.fromarray(mask)


def overlay(image: Image.Image, mask: Image.Image, original: Image.Image, region: Box | None = None) -> Image.Image:
    """The repainted image where the mask is white, the original elsewhere, and a mixture where the mask is grey.

    Args:
      image: the result of inpainting: of the size of ``original``, or of the region, to whose size it is brought.
      mask: of the size of ``original``.
      original: what was inpainted.
      region: where the result belongs, as :func:`crop_region` returns it.

    Returns:
      An RGB image of the size of ``original``; where the mask is black, its pixels are those of ``original``.

    Raises:
      ValueError: sizes differ.
    """
    if mask.size != original.size or (region is None and image.size != original.size):
        shown = ", ".join(f"{w}x{h}" for w, h in (image.size, mask.size, original.size))
        raise ValueError(f"image, mask and original must be of one size without a region, got {shown} (width x height)")
    repainted = image.convert("RGB")
    if region is not None:
        left, top, right, bottom = region
        part = resize(repainted, bottom - top, right - left, "crop")
        repainted = Image.new("RGB", original.size)
        repainted.paste(part, (left, top))
    known = Image.new("RGBa", original.size)  # colours multiplied by alpha, so that soft edges mix right
    known.paste(original.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
    mixed = repainted.convert("RGBA")
    mixed.alpha_composite(known.convert("RGBA"))
    return mixed.convert("RGB")


# Masks for attention


def mask_for_queries(masks: Any, queries: int) -> NDArray[np.float32]:
    """Masks of images as weights of the queries of an attention layer, as IP-Adapters take them.

    Args:
      masks: ``[N,H,W]`` or ``[N,H,W,1]``, from 0 to 1.
      queries: of the layer, one for each pixel of its features, row after row.

    Returns:
      float32 ``[N,queries]``, by PyTorch's bicubic interpolation. Where the features have another aspect ratio than the
      mask, a warning says so, and the weights are cut or end in zeros.

    Raises:
      ValueError: the masks have another shape, or there are no queries.
    """
    array = np.asarray(masks, np.float32)
    array = array[..., 0] if array.ndim == 4 and array.shape[-1] == 1 else array
    if array.ndim != 3 or 0 in array.shape or queries < 1:
        raise ValueError(f"masks must be [N,H,W] or [N,H,W,1] and queries at least 1, got {array.shape} and {queries}")
    rows, columns = query_grid(array.shape[1], array.shape[2], queries)
    if rows * columns != queries:
        warn(f"{queries} queries have another aspect ratio than the masks of {array.shape[1]}x{array.shape[2]} pixels")
    return at_queries(array, queries)
