"""Images that can share a device call, collected into batches from a stream of any length and order."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def batches(items: Iterable[tuple[Hashable, Item]], size: int, window: int) -> Iterator[list[Item]]:
    """Batches of at most ``size`` items of one group, in the order in which they become full.

    A batch that is not full is given out when its first item is ``window`` items old, or at the end. No more than
    ``window`` items are held back at any time.

    Args:
      items: pairs of a group and an item.
      size: the largest number of items of a batch.
      window: see above; at least ``size``, so that a stream of one group fills its batches.
    """
    waiting: dict[Hashable, list[Item]] = {}
    born: dict[Hashable, int] = {}  # group -> the position of its first waiting item; the oldest comes first
    for at, (group, item) in enumerate(items):
        members = waiting.setdefault(group, [])
        members.append(item)
        born.setdefault(group, at)
        if len(members) == size:
            del born[group]
            yield waiting.pop(group)
        oldest = next(iter(born), None)
        if oldest is not None and at - born[oldest] + 1 >= window:
            del born[oldest]
            yield waiting.pop(oldest)
    yield from waiting.values()
