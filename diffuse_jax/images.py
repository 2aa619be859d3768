"""Turn an image or an image file into upright RGB pixels, for training and for sampling.

``docs/images.md`` has the table of what is converted and what is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from diffuse_jax.limits import refuse_links
from diffuse_jax.messages import warn

SIGNATURES = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "WEBP": (b"RIFF",),
    "BMP": (b"BM",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}
"""Accepted formats and how their files begin. For some of the others Pillow would start external programs."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")

UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, IndexError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that are damaged, or larger than it considers safe."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the transposition that makes the image upright; with other values it is upright already."""

ORIENTATION = 0x0112


@contextlib.contextmanager
def opened(source: bytes | str | Path, name: str) -> Iterator[Image.Image]:
    """Open the image in a file, without decoding it yet.

    Args:
      source: the file's path, or its bytes.
      name: its name in error messages.

    Raises:
      ValueError: on opening or inside the block: the file is damaged or in none of the formats of :data:`SIGNATURES`.
      FileNotFoundError: there is no such file.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file, formats=tuple(SIGNATURES)) as image:
            yield image
    except (FileNotFoundError, RefusedImage):
        raise
    except UNREADABLE as error:
        raise ValueError(
            f"{name} is not a readable image: {error} (supported formats: {', '.join(SIGNATURES)})"
        ) from error


class RefusedImage(ValueError):
    """A readable image whose values have no known range."""


def rgb(image: Image.Image, name: str) -> Image.Image:
    """The image, upright and in 8-bit RGB.

    Takes the current frame of an animation (of a file, the first), drops transparency, and rounds 16-bit greyscale to
    8 bits.

    Raises:
      RefusedImage: floating-point or 32-bit values.
    """
    image = upright(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # a PNG has 16 bits at most
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise RefusedImage(
            f"{_named(image, name)} has {kind} values (mode {image.mode!r}) of unknown range; scale them to 0 to 255 "
            "and convert the image to 8 bits (mode 'L' or 'RGB')"
        )
    if image.mode == "La":  # greyscale multiplied by its alpha, which Pillow converts to nothing else
        image = image.convert("LA")
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """The image with its EXIF orientation applied and removed; the same object if there is nothing to do."""
    turn = _turn(image)
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format
    turned.getexif().pop(ORIENTATION, None)
    for key in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
        turned.info.pop(key, None)
    return turned


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of the upright image, without decoding it."""
    swapped = _turn(image) in (TURNS[5], TURNS[6], TURNS[7], TURNS[8])
    return (image.width, image.height) if swapped else (image.height, image.width)


def _turn(image: Image.Image) -> Image.Transpose | None:
    if image.format == "TIFF":  # Pillow turns it as it decodes it, and states its upright size before that
        return None
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except (*UNREADABLE, KeyError):  # damaged EXIF, or a list instead of a number: the orientation is unknown
        return None


def _named(image: Image.Image, name: str) -> str:
    file = str(getattr(image, "filename", "") or "")
    return f"{name} ({file})" if file and file not in name else name


# Folders


@dataclasses.dataclass(frozen=True)
class Skipped:
    """What a folder holds besides images: the number of such files and folders, and the first of them."""

    count: int = 0
    first: str = ""


def find_images(folder: Path) -> tuple[list[Path], Skipped]:
    """The images in a folder and its subfolders, sorted by path, and what was skipped.

    Hidden files and folders (``._a.png``, ``.ipynb_checkpoints``), files of other names, and files that have the name
    of an image but do not begin like one are skipped, as are links to folders and folders that cannot be read.

    Raises:
      WeightsError: a link that leaves the folder.
    """
    refuse_links(folder, deep=True)
    found: list[Path] = []
    skipped: list[Path] = []
    unreadable = lambda error: skipped.append(Path(error.filename))
    for parent, folders, files in os.walk(folder, onerror=unreadable):
        below = [Path(parent, name) for name in folders]
        skipped += [path for path in below if path.name.startswith(".") or path.is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in files):
            (found if is_image(path) else skipped).append(path)
    return sorted(found), Skipped(len(skipped), str(min(skipped, default="")))


def warn_of(skipped: Skipped, where: str) -> None:
    """Warn about skipped files, if there are any."""
    if skipped.count:
        warn(f"{where}: skipped {skipped.count} non-images, for example {skipped.first}")


def is_image(path: Path) -> bool:
    """Whether a file is not hidden, is named like an image and begins like one."""
    if path.name.startswith(".") or path.suffix.lower() not in SUFFIXES or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(8).startswith(tuple(start for starts in SIGNATURES.values() for start in starts))
