"""The rows of a data set in each batch, as a function of the seed and of the number of examples before the batch.

Each epoch has a new order, and the sequence of epochs is split into batches without gaps: nothing is dropped at the end
of an epoch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from diffuse_jax.training.data.transform import BUCKETS, ORDER, SETS, Size


class Rows(NamedTuple):
    """Rows of the source, int ``[B]``, and the size of their bucket, if there are buckets."""

    indices: np.ndarray
    size: Size | None = None


@dataclasses.dataclass(frozen=True)
class Plain:
    """Batches of rows in shuffled order, without buckets."""

    seed: int
    total: int
    batch_size: int

    def __call__(self, start: int) -> Rows:
        """The batch after ``start`` examples."""
        return Rows(stream(self.seed, np.arange(start, start + self.batch_size), self.total))


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Batches of several data sets whose rows follow each other, each data set with its share of every epoch.

    Every data set is a separate endless sequence of its own epochs, so that within it all rows are seen equally often,
    whatever the shares; in an epoch of the whole the data sets come in random order.

    Attributes:
      seed: determines the orders.
      lengths: number of rows of each data set.
      counts: number of examples of each in an epoch.
      batch_size: number of examples in a batch.
    """

    seed: int
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    batch_size: int

    @property
    def total(self) -> int:
        """The number of examples in an epoch."""
        return sum(self.counts)

    def __call__(self, start: int) -> Rows:
        """The batch after ``start`` examples."""
        epochs, places = np.divmod(np.arange(start, start + self.batch_size), self.total)
        rows = np.empty(self.batch_size, np.int64)
        firsts = np.cumsum((0, *self.lengths))
        for epoch in np.unique(epochs):
            parts, ranks = _mixture(self.seed, int(epoch), self.counts)
            for part in range(len(self.counts)):
                here = np.flatnonzero(epochs == epoch)
                here = here[parts[places[here]] == part]
                reached = epoch * self.counts[part] + ranks[places[here]]
                rows[here] = firsts[part] + stream(self.seed, reached, self.lengths[part], part)
        return Rows(rows)


@lru_cache(maxsize=2)
def _mixture(seed: int, epoch: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The data set of every example of an epoch, and the number of examples of the same data set before it there."""
    parts = np.random.default_rng([seed, SETS, epoch]).permutation(np.repeat(np.arange(len(counts)), counts))
    ranks = np.empty_like(parts)
    for part, count in enumerate(counts):
        ranks[parts == part] = np.arange(count)
    return parts, ranks


def shares(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """``total`` divided in proportion to ``weights``, by largest remainders; every part gets at least 1."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * total
    counts = np.maximum(np.floor(exact), 1).astype(int)
    for part in np.argsort(counts - exact, kind="stable")[: max(0, total - int(counts.sum()))]:
        counts[part] += 1
    return tuple(counts.tolist())


def stream(seed: int, positions: np.ndarray, total: int, bucket: int = -1) -> np.ndarray:
    """The rows at ``positions`` of the endless sequence of epochs over ``total`` rows (of one bucket)."""
    epochs, places = np.divmod(positions, total)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = _epoch_order(seed, bucket, int(epoch), total)[places[here]]
    return rows


@lru_cache(maxsize=32)  # 4 bytes per row each
def _epoch_order(seed: int, bucket: int, epoch: int, total: int) -> np.ndarray:
    rng = np.random.default_rng([seed, ORDER, epoch] + [bucket] * (bucket >= 0))
    return rng.permutation(np.arange(total, dtype=np.int32 if total < 2**31 else np.int64))


class Bucketed:
    """Batches that each come from a single bucket.

    Every bucket is a separate endless sequence that is split without gaps. An epoch contains the batches of each bucket
    that are filled during it, in random order: with 10 rows and batches of 4, two in one epoch and three in the next.
    Every row is therefore seen equally often, whatever its bucket.
    """

    def __init__(self, seed: int, members: Sequence[np.ndarray], sizes: Sequence[Size], batch_size: int) -> None:
        """``members[k]``, int ``[n_k]``, are the rows of the bucket with the size ``sizes[k]``."""
        filled = [(np.asarray(rows), size) for rows, size in zip(members, sizes, strict=True) if len(rows)]
        self.seed, self.batch_size = seed, batch_size
        self.members, self.sizes = [rows for rows, _ in filled], [size for _, size in filled]
        self.counts = np.array([len(rows) for rows in self.members])
        self.total = int(self.counts.sum())

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
        """The number of batches of each bucket before ``epoch``, ``[K]``."""
        return self.counts * epoch // self.batch_size

    def _epoch(self, number: int) -> int:
        """The epoch of batch ``number``: the first one by whose end more than ``number`` batches are complete."""
        epoch = number * self.batch_size // self.total
        while self._batches(epoch + 1).sum() <= number:
            epoch += 1
        return epoch


@lru_cache(maxsize=2)
def _bucket_order(seed: int, epoch: int, batches: tuple[int, ...]) -> np.ndarray:
    buckets = np.repeat(np.arange(len(batches)), batches)
    return np.random.default_rng([seed, BUCKETS, epoch]).permutation(buckets)
