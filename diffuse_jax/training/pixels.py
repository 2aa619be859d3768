"""Pictures in and out of trainers without captions. Worker processes import this module, so it has no JAX in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from diffuse_jax.training.batches import Batch
from diffuse_jax.training.data import DataSettings, Example, Record, source_from, transform_from


def pixel_values(example: Example) -> Batch:
    """The arrays of one example: ``pixel_values`` uint8 ``[h,w,3]``, to be normalised on the device."""
    assert example.pixels is not None  # batches are made with pictures
    return {"pixel_values": example.pixels}


def first_pictures(data: DataSettings, count: int) -> Iterator[np.ndarray]:
    """The middle squares of (at most) the first ``count`` pictures, uint8 ``[resolution,resolution,3]``."""
    transform = transform_from(data)
    for index, record in itertools.islice(_records(data), count):
        pixels = transform.fixed(record, index).pixels
        assert pixels is not None
        yield pixels


def _records(data: DataSettings) -> Iterator[tuple[int, Record]]:
    if data.streaming:
        from diffuse_jax.training.data.opening import stream_from
        from diffuse_jax.training.data.stream import Records

        rows = Records(stream_from(data))
        return iter(rows.__next__, None)
    source = source_from(data)
    return ((index, source[index]) for index in range(len(source)))


def picture_files(paths: Sequence[str], data: DataSettings) -> list[np.ndarray]:
    """The same of picture files.

    Raises:
      FileNotFoundError: one is missing.
      ValueError: one cannot be read as a picture.
    """
    transform = transform_from(data)
    examples = [transform.fixed(Record(path, ("",), path), index) for index, path in enumerate(paths)]
    return [example.pixels for example in examples if example.pixels is not None]


def sheet(rows: Sequence[np.ndarray]) -> Image.Image:
    """Pictures uint8 ``[n,h,w,3]`` side by side, one row below the other."""
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """[-1, 1] to uint8, clipped and rounded."""
    return np.round(np.clip(pixels, -1, 1) * 127.5 + 127.5).astype(np.uint8)
