"""The collectives of a compiled program, read from its text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "f16": 16,
    "bf16": 16,
    "s64": 64,
    "u64": 64,
}
"""Bits of an element; 32 for the others, except float8."""

_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (.*?) ({'|'.join(KINDS)})(-start)?\(", re.MULTILINE)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """An instruction that moves data between devices.

    Attributes:
      kind: one of :data:`KINDS`.
      bytes: size of its result on one device; one of a loop's body counts once.
    """

    kind: str
    bytes: int


def collectives(text: str) -> list[Collective]:
    """The collectives in ``compiled.as_text()``; one that is started and waited for counts once."""
    found = []
    for kind_of_result, kind, start in _INSTRUCTION.findall(text):
        sizes = [_bytes(*array) for array in _ARRAY.findall(kind_of_result)]
        found.append(Collective(kind, max(sizes, default=0) if start else sum(sizes)))
    return found


def _bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype.startswith("f8") else BITS.get(dtype, 32)
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8
