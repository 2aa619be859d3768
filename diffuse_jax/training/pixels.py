"""Reading and writing images for trainers without captions. Worker processes import this module, so it has no JAX."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from diffuse_jax.training.batches import Batch
from diffuse_jax.training.data import DataSettings, Example, Record, source_from, transform_from


def pixel_values(example: Example) -> Batch:
    """The arrays of one example: ``pixel_values`` uint8 ``[h,w,3]``, to be normalised on the device."""
    assert example.pixels is not None  # batches are made with images
    return {"pixel_values": example.pixels}


def first_images(data: DataSettings, count: int) -> Iterator[np.ndarray]:
    """The centre crops of the first ``count`` images (or fewer), uint8 ``[resolution,resolution,3]``."""
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


def read_images(paths: Sequence[str], data: DataSettings) -> list[np.ndarray]:
    """The centre crops of image files, uint8 ``[resolution,resolution,3]``.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file cannot be read as an image.
    """
    transform = transform_from(data)
    examples = [transform.fixed(Record(path, ("",), path), index) for index, path in enumerate(paths)]
    return [example.pixels for example in examples if example.pixels is not None]


def sheet(rows: Sequence[np.ndarray]) -> Image.Image:
    """A grid of images: each element of ``rows``, uint8 ``[n,h,w,3]``, is one row."""
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] as uint8, clipped and rounded."""
    return np.round(np.clip(pixels, -1, 1) * 127.5 + 127.5).astype(np.uint8)
