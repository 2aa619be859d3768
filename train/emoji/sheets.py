"""Sheets of captioned images for the documentation."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

CELL, LINE, SIZE, WRAP = 128, 18, 15, 17
"""Side of an image and height of a line of text in pixels, font size, and number of characters that fit under an
image."""


class Row(NamedTuple):
    """Images side by side, each with a caption below (wrapped to fit), and an optional title above."""

    images: Sequence[Image.Image]
    captions: Sequence[str]
    colour: str = "#202020"
    title: str = ""


def sheet(rows: Sequence[Row]) -> Image.Image:
    """Draw the rows from top to bottom, on white; the height of a row depends on its longest caption."""
    wrapped = [[folded(caption) for caption in row.captions] for row in rows]
    lines = [bool(row.title) + max(len(caption) for caption in captions) for row, captions in zip(rows, wrapped)]
    height = sum(CELL + LINE * count + LINE // 2 for count in lines)
    page = Image.new("RGB", (CELL * max(len(row.images) for row in rows), height), "white")
    pen, font, y = ImageDraw.Draw(page), ImageFont.load_default(SIZE), 0
    for row, captions in zip(rows, wrapped, strict=True):
        if row.title:
            pen.text((3, y), row.title, "#1040a0", font)
            y += LINE
        for i, (image, caption) in enumerate(zip(row.images, captions, strict=True)):
            page.paste(image.convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC), (i * CELL, y))
            for n, line in enumerate(caption):
                pen.text((i * CELL + 3, y + CELL + n * LINE), line, row.colour, font)
        y += CELL + LINE * max(len(caption) for caption in captions) + LINE // 2
    return page


def folded(caption: str) -> list[str]:
    """The lines of a caption; the style, after its last comma, begins a new line."""
    return [line for part in caption.rsplit(", ", 1) for line in textwrap.wrap(part, WRAP)]
