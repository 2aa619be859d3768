"""The interface between the training loop and its data, and its simplest implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:  # worker processes import this module, and need no JAX for it
    pass

Batch = dict[str, np.ndarray]
"""Arrays ``[rows, ...]``: the rows of a training step that this process provides, all accumulation steps together."""


class Batches(Protocol):
    """An endless iterator over the batches of a run whose position can be saved and restored."""

    @property
    def names(self) -> Sequence[str]:
        """The files or keys of the examples in the batch returned last, for error messages."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """The position after the batch returned last, serialisable as JSON; part of every checkpoint."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a position: the next batch is the one that would have followed it."""


class IndexedBatches:
    """Batches that are a function of their index."""

    def __init__(self, batch: Callable[[int], Batch], name: Callable[[int], Sequence[str]] = lambda n: ()) -> None:
        self._batch, self._name = batch, name
        self._next = 0
        self.names: Sequence[str] = ()

    def __next__(self) -> Batch:
        n, self._next = self._next, self._next + 1
        self.names = self._name(n)
        return self._batch(n)

    def get_state(self) -> dict[str, Any]:
        return {"batch": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next = state["batch"]


class WithStepIndex:
    """Adds ``update`` int32 ``[rows]``, the index of the training step, to other batches.

    This is for losses that change during the run.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._next = 0

    @property
    def names(self) -> Sequence[str]:
        return self._batches.names

    @property
    def total(self) -> int | None:
        """The number of examples in an epoch, if it is known."""
        return getattr(self._batches, "total", None)

    def __next__(self) -> Batch:
        n, self._next = self._next, self._next + 1
        batch = next(self._batches)
        rows = len(next(iter(batch.values())))
        return batch | {"update": np.full(rows, n, np.int32)}

    def get_state(self) -> dict[str, Any]:
        return {"update": self._next, "batches": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next = state["update"]
        self._batches.set_state(state["batches"])

    def close(self) -> None:
        """Close the underlying batches, if they can be closed."""
        getattr(self._batches, "close", lambda: None)()
