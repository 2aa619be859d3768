"""Small data sets on disk, for the tests of what reads them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffuse_jax.training.data import DataSettings, Example, add_data, data_from
from diffuse_jax.training.flags import Parser
from diffuse_jax.training.settings import BatchSettings


def flat_image(number: int, height: int = 8, width: int = 8) -> Image.Image:
    """All pixels have the value ``number``."""
    return Image.fromarray(np.full((height, width, 3), number, np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def image_folder(folder: Path, count: int, sizes: Sequence[tuple[int, int]] = ((8, 8),)) -> Path:
    """``0.png`` ... whose pixels have the value of their number; captions "0", "1" ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        flat_image(i, *sizes[i % len(sizes)]).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": str(i)}) for i in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def table(count: int, first: int = 0, **columns: list[Any]) -> Any:
    """A ``datasets.Dataset`` with the columns image, text and those given."""
    import datasets

    numbers = range(first, first + count)
    rows = {"image": [{"bytes": png(flat_image(i)), "path": None} for i in numbers], "text": [str(i) for i in numbers]}
    return datasets.Dataset.from_dict(rows | columns).cast_column("image", datasets.Image())


def flags(*line: str, **values: Any) -> DataSettings:
    """The settings of flags of :func:`add_data`; ``values`` are other defaults, also for flags of whole scripts."""
    parser = Parser()
    add_data(parser, caches=True, resolution=8)
    parser.set_defaults(**{"output_dir": "unused", "seed": 0, **values})
    return data_from(parser.parse_args(list(line)))


def per_device(count: int = 2) -> BatchSettings:
    """Batches of so many images per device."""
    return BatchSettings(train_batch_size=count)


def finish(example: Example) -> dict[str, np.ndarray]:
    """The pixels, their source, and the process that made them."""
    return {
        "pixels": np.zeros(1) if example.pixels is None else example.pixels,
        "caption": np.int64(example.caption or -1),
        "index": np.int64(example.index),
        "process": np.int64(os.getpid()),
    }
