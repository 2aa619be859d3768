"""Sheets of captioned images, as the documentation shows them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

CELL, LINE, SIZE, WRAP = 128, 18, 15, 17
"""Pixels of an image's edge and of a line of text, the size of its letters, and how many of them fit under an image."""


class Row(NamedTuple):
    """Images side by side, a caption under each (its lines are broken to fit), and a title above where given."""

    images: Sequence[Image.Image]
    captions: Sequence[str]
    colour: str = "#202020"
    title: str = ""


def sheet(rows: Sequence[Row]) -> Image.Image:
    """The rows from top to bottom, on white; every row is as high as its longest caption needs."""
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
    """The lines of a caption; the style after its last comma begins a new one."""
    return [line for part in caption.rsplit(", ", 1) for line in textwrap.wrap(part, WRAP)]
