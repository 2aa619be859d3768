"""An image of a comparison: our images, PyTorch's, and their amplified differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffuse_jax.writing import atomic_file

HEADER, GAP, SMALLEST, SIZE = 30, 4, 256, 20
"""In pixels: height of the caption, gap between images, the width up to which they are enlarged, and the font size."""

FACTORS = (10**6, *(digit * 10**power for power in range(5, -1, -1) for digit in (5, 2, 1)))


def amplification(ours: np.ndarray, theirs: np.ndarray) -> int:
    """The largest of 1, 2, 5, 10, ... by which all differences of images in [0, 1] can be multiplied without exceeding
    1."""
    largest = float(np.abs(ours - theirs).max(initial=0.0))
    return next((factor for factor in FACTORS if largest * factor <= 1), 1) if largest else 1


def side_by_side(ours: np.ndarray, theirs: np.ndarray) -> Image.Image:
    """A row for each image: ours, PyTorch's and the absolute difference, amplified by the factor in the caption.

    Args:
      ours, theirs: float ``[B,H,W,3]`` in [0, 1].
    """
    factor = amplification(ours, theirs)
    columns = {
        "diffuse_jax": ours,
        "PyTorch": theirs,
        f"difference x {factor:,}": np.clip(np.abs(ours - theirs) * factor, 0, 1),
    }
    images, height, width, _ = ours.shape
    zoom = max(1, SMALLEST // width)
    height, width = height * zoom, width * zoom
    sheet = Image.new("RGB", (3 * (width + GAP) - GAP, HEADER + images * (height + GAP) - GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(SIZE)
    for column, (caption, column_images) in enumerate(columns.items()):
        left = column * (width + GAP)
        pen.text((left + width // 2, HEADER // 2), caption, "black", font, anchor="mm")
        for row, pixels in enumerate(column_images):
            tile = Image.fromarray(np.round(pixels * 255).astype(np.uint8))
            tile = tile.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (left, HEADER + row * (height + GAP)))
    return sheet


def save_image(path: Path, ours: np.ndarray, theirs: np.ndarray) -> Path:
    """Write the image of :func:`side_by_side` as PNG, atomically."""
    with atomic_file(path) as file:
        side_by_side(ours, theirs).save(file, format="PNG")
    return path
