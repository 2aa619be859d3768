"""Which rows of a data set each batch holds: a function of the seed and of how many examples came before.

The rows of an epoch come in a new order each time, and the stream of epochs is cut into batches without gaps: nothing
is dropped where an epoch ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from diffuse_jax.training.data.transform import BUCKETS, ORDER, Size


class Rows(NamedTuple):
    """Rows of the source ``[B]``, and the size of the bucket that they belong to, if there are buckets."""

    indices: np.ndarray
    size: Size | None = None


@dataclasses.dataclass(frozen=True)
class Plain:
    """All rows alike."""

    seed: int
    total: int
    batch_size: int

    def __call__(self, start: int) -> Rows:
        """The batch after ``start`` examples."""
        return Rows(stream(self.seed, np.arange(start, start + self.batch_size), self.total))


def stream(seed: int, positions: np.ndarray, total: int, bucket: int = -1) -> np.ndarray:
    """Rows at ``positions`` of the endless sequence of epochs over ``total`` rows (of one bucket)."""
    epochs, places = np.divmod(positions, total)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = _epoch_order(seed, bucket, int(epoch), total)[places[here]]
    return rows


@lru_cache(maxsize=8)  # 4 bytes per row each
def _epoch_order(seed: int, bucket: int, epoch: int, total: int) -> np.ndarray:
    rng = np.random.default_rng([seed, ORDER, epoch] + [bucket] * (bucket >= 0))
    return rng.permutation(np.arange(total, dtype=np.int32 if total < 2**31 else np.int64))


class Bucketed:
    """Batches of one bucket each.

    Every bucket is an endless sequence of its own that is cut without gaps, and an epoch holds as many of its batches
    as fill up meanwhile, in random order: with 10 rows and batches of 4, two in one epoch and three in the next. So
    every row is seen equally often, whatever its bucket.
    """

    def __init__(self, seed: int, members: Sequence[np.ndarray], sizes: Sequence[Size], batch_size: int) -> None:
        """``members[k]``: the rows of the bucket of ``sizes[k]``, int ``[n_k]``."""
        filled = [(np.asarray(rows), size) for rows, size in zip(members, sizes, strict=True) if len(rows)]
        self.seed, self.batch_size = seed, batch_size
        self.members, self.sizes = [rows for rows, _ in filled], [size for _, size in filled]
        self.counts = np.array([len(rows) for rows in self.members])

    def __call__(self, start: int) -> Rows:
        """The batch after ``start`` examples."""
        number = start // self.batch_size
        epoch = self._epoch(number)
        before = self._batches(epoch)
        order = _bucket_order(self.seed, epoch, tuple(self._batches(epoch + 1) - before))
        place = number - int(before.sum())
        bucket = order[place]
        rank = int(before[bucket]) + int((order[:place] == bucket).sum())
        positions = np.arange(rank * self.batch_size, (rank + 1) * self.batch_size)
        chosen = stream(self.seed, positions, int(self.counts[bucket]), int(bucket))
        return Rows(self.members[bucket][chosen], self.sizes[bucket])

    def _batches(self, epoch: int) -> np.ndarray:
        """How many batches of each bucket come before ``epoch``, ``[K]``."""
        return self.counts * epoch // self.batch_size

    def _epoch(self, number: int) -> int:
        """The epoch that batch ``number`` lies in: the first after whose end more batches than that are done."""
        epoch = number * self.batch_size // int(self.counts.sum())
        while self._batches(epoch + 1).sum() <= number:
            epoch += 1
        return epoch


@lru_cache(maxsize=2)
def _bucket_order(seed: int, epoch: int, batches: tuple[int, ...]) -> np.ndarray:
    buckets = np.repeat(np.arange(len(batches)), batches)
    return np.random.default_rng([seed, BUCKETS, epoch]).permutation(buckets)
