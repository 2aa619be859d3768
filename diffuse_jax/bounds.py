"""The numbers that flags and settings may be, and what refuses others. This module loads no JAX."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from diffuse_jax.messages import brief


@dataclasses.dataclass(frozen=True)
class Number:
    """Finite numbers that a flag or setting may be.

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
        if not isinstance(value, kind) or isinstance(value, bool):
            return False
        try:
            return math.isfinite(value) and self.fits(value)
        except OverflowError:  # an integer beyond the floats, and so beyond all these bounds
            return False

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
            raise ValueError(f"must be {self.words}, got {text[:80] or repr(text)}")
        return value


LARGEST = 2**31 - 1
"""The largest count; steps are counted in int32."""

COUNT = Number(int, "a whole number of at least 1 and less than 2^31", lambda n: 1 <= n <= LARGEST)
NATURAL = Number(int, "a whole number of at least 0 and less than 2^31", lambda n: 0 <= n <= LARGEST)
SEED = Number(int, "a whole number of at least 0 and less than 2^32", lambda n: 0 <= n < 2**32)
TORCH_SEED = Number(int, "a whole number of at least 0 and less than 2^64", lambda n: 0 <= n < 2**64)
DEVICES = Number(int, "a whole number of at least 1, or -1 for all that remain", lambda n: n == -1 or 1 <= n <= LARGEST)
POSITIVE = Number(float, "a finite number above 0", lambda x: x > 0)
NONNEGATIVE = Number(float, "a finite number of at least 0", lambda x: x >= 0)
AT_LEAST_ONE = Number(float, "a finite number of at least 1", lambda x: x >= 1)
SHARE = Number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
THIRD = Number(float, "a number from 0 to 1/3", lambda x: 0 <= x <= 1 / 3)
PORTION = Number(float, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
FINITE = Number(float, "a finite number", lambda x: True)
MODE_SCALE = Number(float, "a number from -1 to 2 / (pi - 2), about 1.75", lambda x: -1 <= x <= 2 / (math.pi - 2))
DECAY = Number(float, "a number of at least 0 and less than 1", lambda x: 0 <= x < 1)


def number(kind: Number) -> Callable[[str], float]:
    """An argparse type: numbers of this kind alone."""

    def parse(text: str) -> float:
        try:
            return kind.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def whole(value: Any, name: str) -> int:
    """An integer of Python, NumPy or JAX as Python's.

    Raises:
      ValueError: it is not an integer of up to :data:`LARGEST`; ``name`` says which argument it is.
    """
    with contextlib.suppress(TypeError):
        if not isinstance(value, bool) and abs(found := operator.index(value)) <= LARGEST:
            return found
    raise ValueError(f"{name} must be an integer (less than 2^31), got {brief(value)}")


def real(value: Any, name: str) -> float:
    """A finite number of Python, NumPy or JAX as Python's.

    Raises:
      ValueError: it is not a finite number.
    """
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool | str | bytes) and math.isfinite(value):
            return float(value)
    raise ValueError(f"{name} must be a finite number, got {brief(value)}")


def flag(value: Any, name: str) -> bool:
    """True or False of Python, NumPy or JAX, or 1 or 0, as Python's; text such as "false" is neither.

    Raises:
      ValueError: it is none of these.
    """
    with contextlib.suppress(TypeError, ValueError):
        if value in (False, True):
            return bool(value)
    raise ValueError(f"{name} must be True or False, got {brief(value)}")
