"""Images as the bytes of files, with the settings that produced them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffuse_jax.output import a1111_parameters, png_info
from diffuse_jax.pipelines.running import as_images

SUFFIXES = {"png": "png", "webp": "webp", "jpeg": "jpg"}
"""Format of Pillow in lower case -> the suffix of its files."""

EXIF, USER_COMMENT = 0x8769, 0x9286
"""Where AUTOMATIC1111's web UI puts the settings of files that are not PNGs."""

LONGEST_EXIF = 65533
"""Bytes that a segment of a JPEG holds."""


def encoded(pixels: np.ndarray, settings: Mapping[str, Any], kind: str, quality: int) -> bytes:
    """The file of an image.

    Args:
      pixels: uint8 ``[H,W,3]``, or with one channel.
      settings: what is stored in the file; a JPEG has no room for more than about 32,000 characters, and then has none.
      kind: one of ``SUFFIXES``.
      quality: of JPEG and lossy WebP, 1 to 100; PNG has none.
    """
    (image,) = as_images(pixels[None])
    buffer = io.BytesIO()
    if kind == "png":
        image.save(buffer, "PNG", pnginfo=png_info(settings, image))
        return buffer.getvalue()
    exif = image.getexif()
    text = a1111_parameters(settings, image.size)
    exif.get_ifd(EXIF)[USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    exif[EXIF] = exif.get_ifd(EXIF)
    data = exif.tobytes()
    fits = kind != "jpeg" or len(data) <= LONGEST_EXIF  # the line of metadata has the settings anyway
    image.save(buffer, kind.upper(), quality=quality, exif=data if fits else b"")
    return buffer.getvalue()
