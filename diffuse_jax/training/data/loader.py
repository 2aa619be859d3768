"""Batches prefetched by threads or worker processes, with a position that can be saved and restored."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffuse_jax.messages import warn
from diffuse_jax.training.batches import Batch
from diffuse_jax.training.data.order import Bucketed, Mixed, Plain
from diffuse_jax.training.data.rescaling import Rescaled
from diffuse_jax.training.data.sources import Source
from diffuse_jax.training.data.transform import Example, Transform
from diffuse_jax.training.data.workers import in_turns

if TYPE_CHECKING:  # worker processes import this module, and need no JAX for it
    import jax
    from jax.sharding import Mesh

Finish = Callable[[Example], dict[str, np.ndarray]]
"""Makes the arrays of one example, such as token ids and pixels; runs in the workers, so it must be picklable."""

THREADS = 2
"""Number of batches that are prepared at once without worker processes."""


@dataclasses.dataclass(frozen=True)
class Maker:
    """Batches as a function of the number of examples before them.

    Iterating yields every ``turns``-th batch, beginning with the one after ``first`` examples.
    """

    source: Source
    transform: Transform | Rescaled
    order: Plain | Bucketed | Mixed
    rows: np.ndarray
    finish: Finish
    first: int = 0
    turns: int = 1

    def __iter__(self) -> Iterator[tuple[Batch, list[str]]]:
        return map(self, itertools.count(self.first, self.turns * self.order.batch_size))

    def __call__(self, start: int) -> tuple[Batch, list[str]]:
        """The batch after ``start`` examples, and the names of its examples."""
        indices, size = self.order(start)
        make = lambda row: self.transform(self.source[int(indices[row])], int(indices[row]), start + int(row), size)
        return collate([make(row) for row in self.rows], self.finish)


def collate(examples: Sequence[Example], finish: Finish) -> tuple[Batch, list[str]]:
    """Stack the arrays of finished examples; also returns the names of the examples."""
    finished = [finish(example) for example in examples]
    return {key: np.stack([f[key] for f in finished]) for key in finished[0]}, [example.name for example in examples]


class Loader:
    """Batches of a source with random access; see :class:`~diffuse_jax.training.batches.Batches`.

    The position is the number of examples before it, over all processes. It does not depend on the number of workers or
    processes, so a run can be resumed with different ones.
    """

    def __init__(self, maker: Maker, workers: int = 0) -> None:
        self.names: Sequence[str] = ()
        self.total = maker.order.total
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
        """The number of examples so far, the batch size, and the examples of each data set (or bucket) in an epoch."""
        return {"examples": self._position, "batch_size": self._maker.order.batch_size, "counts": self._counts}

    @property
    def _counts(self) -> list[int]:
        order = self._maker.order
        return [order.total] if isinstance(order, Plain) else [int(count) for count in order.counts]

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a position; warns if an epoch had other numbers of examples, and so another order.

        Raises:
          ValueError: aspect-ratio buckets are used and the batch size has changed, which would change the batches.
        """
        size = self._maker.order.batch_size
        if isinstance(self._maker.order, Bucketed) and state["batch_size"] != size:
            raise ValueError(
                f"the checkpoint was written with {state['batch_size']} examples per step, this run has {size}: with "
                "--aspect_ratio_buckets both must be equal; change --train_batch_size or "
                "--gradient_accumulation_steps"
            )
        if (before := state.get("counts", self._counts)) != self._counts:
            warn(
                f"the checkpoint was written with {' + '.join(map(str, before))} examples per epoch, this run has "
                f"{' + '.join(map(str, self._counts))}: the order of the examples is another one from here on"
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
    """The rows of the global batch ``[accumulation_steps * rows]`` that a process provides, in its order.

    Processes whose devices hold the same shard of the batch (if the ``tensor`` axis spans processes) provide the same
    rows.

    Args:
      mesh: the mesh of the training step.
      accumulation_steps: number of accumulation steps per training step.
      rows: number of examples per accumulation step, over all processes.
      ours: whether a device belongs to the process; by default, to this process.
    """
    import jax

    from diffuse_jax.sharding import train_batch_sharding

    ours = ours or (lambda device: device.process_index == jax.process_index())
    parts: Any = train_batch_sharding(mesh).devices_indices_map((accumulation_steps, rows))
    mine = {index[1].indices(rows) for device, index in parts.items() if ours(device)}
    columns = np.array(sorted(column for part in mine for column in range(*part)), np.int64)
    return (np.arange(accumulation_steps)[:, None] * rows + columns).reshape(-1)
