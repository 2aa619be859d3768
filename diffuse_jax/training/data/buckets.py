"""Aspect-ratio buckets: images of similar aspect ratio are trained together, at a size with that aspect ratio."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from diffuse_jax.training.data.cache import READERS, cached
from diffuse_jax.training.data.sources import Source
from diffuse_jax.training.data.transform import Size, image_size


def bucket_sizes(resolution: int, step: int = 64, max_aspect: float = 2.0) -> tuple[Size, ...]:
    """Sizes of at most ``resolution ** 2`` pixels with sides that are multiples of ``step``, from wide to tall.

    As for SDXL (Podell et al. 2023, appendix I), whose aspect ratios go up to 4: for each height up to ``resolution``
    the largest width, and the same transposed.

    Raises:
      ValueError: ``step`` does not divide ``resolution``, or ``max_aspect`` is below 1.
    """
    if step < 1 or resolution % step:
        raise ValueError(f"--bucket_step {step} must divide --resolution {resolution}")
    if max_aspect < 1:
        raise ValueError(f"--bucket_max_aspect must be at least 1, got {max_aspect}")
    wide = {(height, resolution**2 // height // step * step) for height in range(step, resolution + 1, step)}
    wide = {(height, width) for height, width in wide if width <= max_aspect * height}
    return tuple(sorted(wide | {(width, height) for height, width in wide}))


def assign(source: Source, sizes: Sequence[Size], cache_dir: str | Path) -> list[tuple[Size, np.ndarray]]:
    """Assign each row to the size with the nearest aspect ratio (in the logarithm).

    The headers of all image files are read for this; their sizes are cached in ``cache_dir``.

    Returns:
      Pairs of a size and its rows, int ``[n]``; sizes without images are left out.
    """

    def read(rows: range) -> dict[str, np.ndarray]:
        with ThreadPoolExecutor(READERS) as pool:
            return {"size": np.array(list(pool.map(lambda i: image_size(source[i]), rows)), np.int32)}

    found = cached(Path(cache_dir) / "sizes", {"data": source.fingerprint}, len(source), read)["size"]
    aspects = np.log([width / height for height, width in sizes])
    nearest = np.abs(np.log(found[:, 1] / found[:, 0])[:, None] - aspects[None]).argmin(axis=1)
    rows = [np.flatnonzero(nearest == number) for number in range(len(sizes))]
    return [(size, members) for size, members in zip(sizes, rows, strict=True) if len(members)]
