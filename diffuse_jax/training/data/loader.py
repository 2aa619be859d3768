"""Batches made ahead of the step, in threads or in worker processes, with a position that can be saved and restored."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffuse_jax.training.batches import Batch
from diffuse_jax.training.data.order import Bucketed, Plain
from diffuse_jax.training.data.sources import Source
from diffuse_jax.training.data.transform import Example, Transform
from diffuse_jax.training.data.workers import in_turns

if TYPE_CHECKING:  # worker processes import this module, and need no JAX for it
    import jax
    from jax.sharding import Mesh

Finish = Callable[[Example], dict[str, np.ndarray]]
"""Makes the arrays of one example, such as token ids and pixels; runs in the workers, so it must pickle."""

THREADS = 2
"""Batches that are made at once where there are no worker processes."""


@dataclasses.dataclass(frozen=True)
class Maker:
    """Batches as a function of the number of examples before them; iterates over every ``turns``-th from ``first``."""

    source: Source
    transform: Transform
    order: Plain | Bucketed
    rows: np.ndarray
    finish: Finish
    first: int = 0
    turns: int = 1

    def __iter__(self) -> Iterator[tuple[Batch, list[str]]]:
        return map(self, itertools.count(self.first, self.turns * self.order.batch_size))

    def __call__(self, start: int) -> tuple[Batch, list[str]]:
        """The batch after ``start`` examples, and the names in it."""
        indices, size = self.order(start)
        make = lambda row: self.transform(self.source[int(indices[row])], int(indices[row]), start + int(row), size)
        return collate([make(row) for row in self.rows], self.finish)


def collate(examples: Sequence[Example], finish: Finish) -> tuple[Batch, list[str]]:
    """Finished examples stacked, and their names."""
    finished = [finish(example) for example in examples]
    return {key: np.stack([f[key] for f in finished]) for key in finished[0]}, [example.name for example in examples]


class Loader:
    """Batches of a source whose rows can be read in any order; see :class:`~diffuse_jax.training.batches.Batches`.

    The position is how many examples of the run came before, counted over all processes. It does not know how many
    workers or processes there are, so a run may go on with other numbers of both.
    """

    def __init__(self, maker: Maker, workers: int = 0) -> None:
        self.names: Sequence[str] = ()
        self.total = len(maker.source)
        self._maker, self._workers = maker, workers
        self._position = 0
        self._iterator: Generator[Any, None, None] | None = None

    def __next__(self) -> Batch:
        if self._iterator is None:
            turns, size = self._workers or THREADS, self._maker.order.batch_size
            starts = [self._position + turn * size for turn in range(turns)]
            shares = [dataclasses.replace(self._maker, first=start, turns=turns) for start in starts]
            self._iterator = in_turns(shares, processes=self._workers > 0)
        batch, self.names = next(self._iterator)
        self._position += self._maker.order.batch_size
        return batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def get_state(self) -> dict[str, Any]:
        """The number of examples up to here, and the size of the batches."""
        return {"examples": self._position, "batch_size": self._maker.order.batch_size}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position.

        Raises:
          ValueError: batches by aspect ratio had another size there: which rows they hold depends on it.
        """
        size = self._maker.order.batch_size
        if isinstance(self._maker.order, Bucketed) and state["batch_size"] != size:
            raise ValueError(
                f"the checkpoint was written with {state['batch_size']} examples per update, this run has {size}: with "
                "--aspect_ratio_buckets both must be alike; change --train_batch_size or "
                "--gradient_accumulation_steps"
            )
        self.close()
        self._position = state["examples"]

    def close(self) -> None:
        """End threads and worker processes; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


def process_rows(
    mesh: Mesh, accumulation_steps: int, rows: int, ours: Callable[[jax.Device], bool] | None = None
) -> np.ndarray:
    """Rows of the global batch ``[accumulation_steps * rows]`` that a process provides, in the order it holds them.

    Processes whose devices hold the same part of the batch (where the ``tensor`` axis spans processes) provide the
    same rows.

    Args:
      mesh: of the training step.
      accumulation_steps: parts of an update.
      rows: examples of each part, of all processes together.
      ours: whether a device belongs to the process; those of this process if None.
    """
    import jax

    from diffuse_jax.sharding import train_batch_sharding

    ours = ours or (lambda device: device.process_index == jax.process_index())
    parts: Any = train_batch_sharding(mesh).devices_indices_map((accumulation_steps, rows))
    mine = {index[1].indices(rows) for device, index in parts.items() if ours(device)}
    columns = np.array(sorted(column for part in mine for column in range(*part)), np.int64)
    return (np.arange(accumulation_steps)[:, None] * rows + columns).reshape(-1)
