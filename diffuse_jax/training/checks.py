"""What the settings of a training check about themselves: the numbers that each may be, and names from a list.

A range is written once, in the annotation of a settings field (``learning_rate: Annotated[float, NONNEGATIVE]``). The
flag of that name refuses the same values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any


@dataclasses.dataclass(frozen=True)
class Number:
    """Finite numbers that a setting may be.

    Attributes:
      kind: int or float.
      words: what they are, as in "must be a number above 0".
      fits: whether a number of this kind is one of them; infinity and NaN are never asked about.
    """

    kind: type[int] | type[float]
    words: str
    fits: Callable[[Any], bool]

    def allows(self, value: Any) -> bool:
        """Whether a value is such a number."""
        kind = Integral if self.kind is int else Real
        return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and self.fits(value)

    def read(self, text: str) -> float:
        """The number that a text says.

        Raises:
          ValueError: it is not such a number.
        """
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if not self.allows(value):
            raise ValueError(f"must be {self.words}, got {text[:80]}")
        return value


LARGEST = 2**31 - 1
"""The largest count; steps are counted in int32."""

COUNT = Number(int, "a whole number of at least 1 and less than 2^31", lambda n: 1 <= n <= LARGEST)
NATURAL = Number(int, "a whole number of at least 0 and less than 2^31", lambda n: 0 <= n <= LARGEST)
SEED = Number(int, "a whole number of at least 0 and less than 2^32", lambda n: 0 <= n < 2**32)
DEVICES = Number(int, "a whole number of at least 1, or -1 for all that remain", lambda n: n == -1 or 1 <= n <= LARGEST)
POSITIVE = Number(float, "a finite number above 0", lambda x: x > 0)
NONNEGATIVE = Number(float, "a finite number of at least 0", lambda x: x >= 0)
AT_LEAST_ONE = Number(float, "a finite number of at least 1", lambda x: x >= 1)
SHARE = Number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
PORTION = Number(float, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
DECAY = Number(float, "a number of at least 0 and less than 1", lambda x: 0 <= x < 1)


@functools.cache
def numbers_of(kind: type) -> Mapping[str, Number]:
    """The fields of a dataclass that have a :class:`Number` in their annotation."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {field.name: _number(hints[field.name]) for field in dataclasses.fields(kind)}
    return {name: number for name, number in found.items() if number is not None}


def _number(hint: Any) -> Number | None:
    """The number in an annotation such as ``Annotated[int, COUNT] | None``."""
    inside = (*getattr(hint, "__metadata__", ()), *map(_number, typing.get_args(hint)))
    return next((part for part in inside if isinstance(part, Number)), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """Base class of settings: their numbers are checked when they are made. None stands for no limit or no wish.

    Raises:
      ValueError: naming the first number that is out of its range.
    """

    def __post_init__(self) -> None:
        for name, number in numbers_of(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            if value is not None and not number.allows(value):
                raise ValueError(f"{name} must be {number.words}, got {value}")


def one_of(choices: Iterable[str], **values: str | None) -> None:
    """Refuse values that are not among the choices; None, where a setting has no value, passes.

    Raises:
      ValueError: naming the first such setting, and the choices.
    """
    known = list(choices)
    for name, value in values.items():
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
