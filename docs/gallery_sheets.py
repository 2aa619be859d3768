"""Sheets of labelled images for the gallery of the documentation."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffuse_jax.pipelines.parts.decode import to_uint8

EDGE, GAP = 128, 8  # pixels that an image of 64 is drawn with, and between two: pages show both at half that size
TOP, LEFT, SIZE = 40, 190, 26  # pixels above and beside the images for labels, and the size of their letters
WRAP = 14  # letters that fit beside the images
SETTINGS: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 4.0, "output_type": "np", "batch_size": 8}

ImageRow = list[np.ndarray]


class Sheet(NamedTuple):
    """Images ``[H,W,3]`` in [0, 1] by rows, with a label for each row and, where given, for each column."""

    rows: list[ImageRow]
    beside: Sequence[str]
    above: Sequence[str] = ()


def in_rows(images: np.ndarray) -> list[ImageRow]:
    """Rows of eight."""
    return [list(images[i : i + 8]) for i in range(0, len(images), 8)]


def thing(prompt: str) -> str:
    """What a prompt asks for, without its style."""
    return prompt.partition(",")[0]


def fits(labels: Sequence[str], font: Any) -> bool:
    """Whether each label is no wider than an image."""
    return all(font.getlength(label) <= EDGE for label in labels)


def draw(sheet: Sheet) -> Image.Image:
    """The images side by side and enlarged, with their labels, on white."""
    step, top = EDGE + GAP, TOP if sheet.above else 0
    page = Image.new("RGB", (LEFT + len(sheet.rows[0]) * step - GAP, top + len(sheet.rows) * step - GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(SIZE)
    narrow = next(f for f in map(ImageFont.load_default, range(SIZE, 0, -1)) if fits(sheet.above, f))
    for x, label in enumerate(sheet.above):
        pen.text((LEFT + x * step + EDGE // 2, top // 2), label, "#202020", narrow, anchor="mm")
    for y, (label, row) in enumerate(zip(sheet.beside, sheet.rows, strict=True)):
        middle = top + y * step + EDGE // 2
        pen.multiline_text((4, middle), textwrap.fill(label, WRAP), "#202020", font, anchor="lm", spacing=6)
        for x, image in enumerate(row):
            small = Image.fromarray(np.asarray(to_uint8(jnp.asarray(image))))
            page.paste(small.resize((EDGE, EDGE), Image.Resampling.LANCZOS), (LEFT + x * step, top + y * step))
    return page
