"""Batches of a data set that is read sequentially during training: ``datasets`` with ``streaming=True``.

Rows are shuffled within windows: a window of rows is read and yielded in random order. The position is the state of the
stream at the start of the window and the number of rows taken from it, so a restored stream reads the window again and
continues with exactly the row that would have followed. (The states of ``datasets`` do not include its shuffle buffer.)
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import logging
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

from diffuse_jax.training.batches import Batch
from diffuse_jax.training.data.hub import Stream, record_of, undecoded
from diffuse_jax.training.data.loader import Finish, collate
from diffuse_jax.training.data.transform import WINDOW, Record, Transform
from diffuse_jax.training.data.workers import in_turns


class Records:
    """The rows of a stream, epoch after epoch, as ``(number, record)``, with a position that can be restored."""

    def __init__(self, stream: Stream, state: dict[str, Any] | None = None) -> None:
        self._stream = stream
        self._at = state or {"epoch": 0, "window": 0, "start": None, "taken": 0, "number": 0}
        self._rows: Iterator[dict[str, Any]] | None = None
        self._window: list[dict[str, Any]] = []

    def __next__(self) -> tuple[int, Record]:
        """The next row, preceded by the number of rows of this share before it.

        Raises:
          ValueError: there are no rows.
        """
        if self._rows is None:
            self._open()
        if self._at["taken"] == len(self._window):
            self._move(window=self._at["window"] + 1, start=self._dataset.state_dict())
            self._read()
        if not self._window and self._at["window"] > 0:
            self._move(epoch=self._at["epoch"] + 1, window=0, start=None)
            self._open()
        if not self._window:
            raise ValueError(f"share {self._stream.part} of {self._stream.parts} of the stream has no rows")
        row, number = self._window[self._at["taken"]], self._at["number"]
        self._at = self._at | {"taken": self._at["taken"] + 1, "number": number + 1}
        where = f"row {number} of share {self._stream.part} of the stream"
        return number, record_of(row, *self._stream.columns, where)

    def get_state(self) -> dict[str, Any]:
        """The position after the row returned last."""
        return self._at

    def _move(self, **place: Any) -> None:
        self._at = self._at | place | {"taken": 0}

    def _open(self) -> None:
        """Begin to read at the start of a window."""
        from datasets.distributed import split_dataset_by_node

        # The shuffle buffer of ``datasets`` has one row here, so the warning that restoring loses it does not apply.
        logging.getLogger("datasets.iterable_dataset").setLevel(logging.ERROR)
        stream = self._stream
        dataset = undecoded(stream.dataset, *stream.columns)
        # Recent versions would mix rows of several files here: a different order, and seconds of sleep at every end.
        recent = "max_buffer_input_shards" in inspect.signature(dataset.shuffle).parameters
        dataset = dataset.shuffle(seed=stream.seed, buffer_size=1, **({"max_buffer_input_shards": 1} if recent else {}))
        if stream.count is None:
            dataset.set_epoch(self._at["epoch"])  # another order of the files
        else:
            dataset = dataset.take(stream.count)
        self._dataset = split_dataset_by_node(dataset, rank=stream.part, world_size=stream.parts)
        if self._at["start"] is not None:
            self._dataset.load_state_dict(self._at["start"])
        self._rows = iter(self._dataset)
        self._read()

    def _read(self) -> None:
        """Read a window, in random order; it is empty at the end of an epoch."""
        assert self._rows is not None
        rows = list(itertools.islice(self._rows, self._stream.window))
        seed = [self._stream.seed, WINDOW, self._at["epoch"], self._at["window"], self._stream.part]
        self._window = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


@dataclasses.dataclass(frozen=True)
class Share:
    """The task of one worker: batches of ``size`` rows of a share, from ``state`` on."""

    stream: Stream
    state: dict[str, Any] | None
    transform: Transform
    finish: Finish
    size: int

    def __iter__(self) -> Iterator[tuple[Batch, list[str], dict[str, Any]]]:
        """Batches, the names of their examples, and the position after each."""
        records = Records(self.stream, self.state)
        while True:
            examples = []
            for number, record in itertools.islice(iter(records.__next__, None), self.size):
                position = number * self.stream.parts + self.stream.part
                examples.append(self.transform(record, position, position))
            yield *collate(examples, self.finish), records.get_state()


class StreamLoader:
    """Batches of a stream; see :class:`~diffuse_jax.training.batches.Batches`.

    Each worker reads its own share and the workers take turns, so a run must be resumed with the same number of
    processes and workers. The position consists of that of each worker after the last of its batches that was returned.
    """

    def __init__(self, stream: Stream, transform: Transform, finish: Finish, size: int, workers: int = 0) -> None:
        """``stream`` is the share of this process, ``size`` the number of rows of a batch that it provides."""
        self.names: Sequence[str] = ()
        self.total = stream.count
        turns = max(workers, 1)
        self._workers, self._parts, self._count = workers, stream.parts, 0
        self._shares = [Share(stream.share(w, turns), None, transform, finish, size) for w in range(turns)]
        self._iterator: Generator[Any, None, None] | None = None

    def __next__(self) -> Batch:
        turn = self._count % len(self._shares)
        if self._iterator is None:
            self._iterator = in_turns(self._shares[turn:] + self._shares[:turn], processes=self._workers > 0)
        batch, self.names, state = next(self._iterator)
        self._shares[turn] = dataclasses.replace(self._shares[turn], state=state)
        self._count += 1
        return batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def get_state(self) -> dict[str, Any]:
        """The number of batches and the position of every worker."""
        return {
            "batches": self._count,
            "processes": self._parts,
            "shares": [share.state for share in self._shares],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a position.

        Raises:
          ValueError: the stream was divided among a different number of processes or workers.
        """
        theirs, ours = (state["processes"], len(state["shares"])), (self._parts, len(self._shares))
        if theirs != ours:
            raise ValueError(
                f"the checkpoint's stream was read by {theirs[0]} processes with {theirs[1]} workers each, this run "
                f"has {ours[0]} with {ours[1]}; a stream must be resumed with the same numbers "
                "(--dataloader_num_workers)"
            )
        self.close()
        self._count = state["batches"]
        pairs = zip(self._shares, state["shares"], strict=True)
        self._shares = [dataclasses.replace(share, state=at) for share, at in pairs]

    def close(self) -> None:
        """End threads and worker processes; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None
