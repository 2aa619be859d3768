"""Batches made ahead of the step, in threads or in worker processes, with a position that can be saved and restored."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffuse_jax.training.batches import Batch
from diffuse_jax.training.data.order import Bucketed, Plain
from diffuse_jax.training.data.sources import Source
from diffuse_jax.training.data.transform import Example, Transform

if TYPE_CHECKING:  # worker processes import this module, and need no JAX for it
    from jax.sharding import Mesh

Finish = Callable[[Example], dict[str, np.ndarray]]
"""Makes the arrays of one example, such as token ids and pixels; runs in the workers, so it must pickle."""

THREADS = 2
"""Batches that are made at once where there are no worker processes."""

ENDLESS = 1 << 40


@dataclasses.dataclass(frozen=True)
class Maker:
    """Batch ``n`` after ``first`` examples, as grain reads it: a source of ``(batch, names)``."""

    source: Source
    transform: Transform
    order: Plain | Bucketed
    rows: np.ndarray
    finish: Finish
    first: int = 0

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> tuple[Batch, list[str]]:
        start = self.first + number * self.order.batch_size
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
        self._iterator: Iterator[Any] | None = None

    def __next__(self) -> Batch:
        if self._iterator is None:
            maker = dataclasses.replace(self._maker, first=self._position)
            self._iterator = read_ahead(maker, self._workers)
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
            self._iterator.close()  # type: ignore[attr-defined]
        self._iterator = None


def read_ahead(maker: Maker, workers: int) -> Iterator[Any]:
    """What ``maker`` holds, in its order, made by ``workers`` processes; by threads of this process if 0."""
    import grain

    dataset = grain.MapDataset.source(maker)
    if workers == 0:
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=THREADS)))
    return in_processes(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)), workers)


def in_processes(dataset: Any, workers: int) -> Iterator[Any]:
    """What a grain ``IterDataset`` of ``(batch, ...)`` holds, each worker making every ``workers``-th element.

    Arrays arrive in shared memory and are copied out of it, so that nothing of it is left when the run ends.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain reads flags of absl, which only a program started by absl would have parsed
        flags.FLAGS.mark_as_parsed()
    options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    iterator = iter(dataset.mp_prefetch(options, worker_init_fn=without_accelerator))
    try:
        for batch, *rest in iterator:
            yield {key: np.array(value) for key, value in batch.items()}, *rest
    finally:
        iterator.close()


def without_accelerator(worker: int, workers: int) -> None:
    """In a worker process: whatever its code imports, the devices belong to the process that trains."""
    os.environ["JAX_PLATFORMS"] = "cpu"


def process_rows(mesh: Mesh, accumulation_steps: int, rows: int, process: int | None = None) -> np.ndarray:
    """Rows of the global batch ``[accumulation_steps * rows]`` that a process provides, in the order it holds them.

    Processes whose devices hold the same part of the batch (where the ``tensor`` axis spans processes) provide the
    same rows.

    Args:
      mesh: of the training step.
      accumulation_steps: parts of an update.
      rows: examples of each part, of all processes together.
      process: index of the process; this one if None.
    """
    import jax

    from diffuse_jax.sharding import train_batch_sharding

    process = jax.process_index() if process is None else process
    shape = (accumulation_steps, rows)
    parts: Any = train_batch_sharding(mesh).devices_indices_map(shape)
    mine = {index[1].indices(rows) for device, index in parts.items() if device.process_index == process}
    columns = np.array(sorted(column for part in mine for column in range(*part)), np.int64)
    return (np.arange(accumulation_steps)[:, None] * rows + columns).reshape(-1)
