"""What the training loop asks of its data, how large a batch is, and the simplest thing that answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:  # worker processes import this module, and need no JAX for it
    pass

Batch = dict[str, np.ndarray]
"""Arrays ``[rows, ...]``: the rows of an update that this process provides, all accumulation steps together."""


class Batches(Protocol):
    """An endless iterator over the batches of a run that can say where it is, and go there.

    Attributes:
      names: what the batch returned last was made of (files or keys), so that an error can name it.
    """

    names: Sequence[str]

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """The position after the batch returned last, as something JSON can hold; part of every checkpoint."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position: the next batch is the one that would have followed there."""


class Numbered:
    """Batches that are a function of their number."""

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


class Counted:
    """Other batches with ``update`` int32 ``[rows]``: how many came before. For losses that change with time."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._next = 0

    @property
    def names(self) -> Sequence[str]:
        return self._batches.names

    @property
    def total(self) -> int | None:
        """Examples in an epoch, if the other batches know it."""
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
        """Close the other batches, if they can be closed."""
        getattr(self._batches, "close", lambda: None)()
