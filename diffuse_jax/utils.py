"""Helpers that users of diffusers know from ``diffusers.utils``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffuse_jax.images import opened, rgb

__all__ = ["load_image", "make_image_grid"]

URL_SECONDS = 60
"""How long a server may be silent."""

LARGEST_DOWNLOAD = 1 << 28
"""Bytes of an image behind a URL."""


def load_image(source: Any) -> Image.Image:
    """An image from anywhere, upright and in 8-bit RGB.

    Args:
      source: a path, an http or https URL, the bytes of a file, a PIL image, or an array ``[H,W,3]``, ``[H,W,1]`` or
        ``[H,W]``, of uint8 or of floating point in [0, 1].

    Raises:
      ValueError: no readable image, an image or array of unknown range, or a URL of another kind.
      OSError: there is no such file, or the server does not give it.
      TypeError: the source is none of these.

    Example::

        image = load_image("apple.png")
    """
    if isinstance(source, Image.Image):
        return rgb(source, "the image")
    if isinstance(source, str | Path):
        with opened(downloaded(str(source)) if "://" in str(source) else source, str(source)) as image:
            return rgb(image, str(source))
    if isinstance(source, bytes | bytearray | memoryview):
        with opened(bytes(source), "the image") as image:
            return rgb(image, "the image")
    if hasattr(source, "ndim") and hasattr(source, "dtype"):
        return _from_array(np.asarray(source))
    raise TypeError(f"an image is a path, URL, bytes, PIL image or array, got {type(source).__name__}")


def downloaded(url: str) -> bytes:
    """What is behind a URL.

    Raises:
      ValueError: it is neither http nor https, or more than :data:`LARGEST_DOWNLOAD`.
      OSError: the server does not give it.
    """
    import http.client
    import urllib.request

    if not url.lower().startswith(("http://", "https://")):
        raise ValueError(f"{url} is not an http or https URL; download it first")
    request = urllib.request.Request(url, headers={"User-Agent": "diffuse-jax"})
    try:
        with urllib.request.urlopen(request, timeout=URL_SECONDS) as answer:
            content: bytes = answer.read(LARGEST_DOWNLOAD + 1)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url} cannot be read: {error}") from error
    if len(content) > LARGEST_DOWNLOAD:
        raise ValueError(f"{url} is larger than {LARGEST_DOWNLOAD >> 20} MiB")
    return content


def _from_array(array: np.ndarray) -> Image.Image:
    shape = array.shape[:2] if array.ndim == 3 and array.shape[2] == 1 else array.shape
    if not (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)) or array.size == 0:
        raise ValueError(f"an image as an array is [H,W,3], [H,W,1] or [H,W] (channel-last), got {array.shape}")
    if np.issubdtype(array.dtype, np.floating) and array.min() >= 0 and array.max() <= 1:
        array = np.round(array.astype(np.float32) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(
            f"an image as an array is uint8, or floating point in [0, 1]; got {array.dtype} from {array.min()} to "
            f"{array.max()}"
        )
    return Image.fromarray(array.reshape(shape)).convert("RGB")


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """Images of one size side by side, row after row, as one RGB image.

    Args:
      images: as many as there are places.
      rows, cols: of the grid.
      resize: height and width that every image gets first, in pixels.

    Raises:
      ValueError: another number of images, or images of different sizes.
    """
    if len(images) != rows * cols or not len(images):
        raise ValueError(f"a grid of {rows}x{cols} takes {rows * cols} images, got {len(images)}")
    found = [image if resize is None else image.resize((resize, resize)) for image in images]
    if len({image.size for image in found}) > 1:
        sizes = ", ".join(f"{w}x{h}" for w, h in sorted({image.size for image in found}))
        raise ValueError(f"the images of a grid must have one size, got {sizes} (width x height); give resize=")
    width, height = found[0].size
    grid = Image.new("RGB", (cols * width, rows * height))
    for k, image in enumerate(found):
        grid.paste(image, (k % cols * width, k // cols * height))
    return grid
