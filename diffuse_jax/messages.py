"""Text for users: short representations of any value from a file, and warnings that point to the user's line."""

from __future__ import annotations

import contextlib
import contextvars
import re
import reprlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

PACKAGE = __name__.partition(".")[0]

MAX_BITS = 256
"""Longer integers are described, not printed; Python refuses to print more than a few thousand digits."""


class _Brief(reprlib.Repr):
    """``repr`` that visits only a few items and levels; a small pickle can describe a tuple of 2**60 leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxtuple = self.maxlist = self.maxset = self.maxfrozenset = self.maxdict = 8
        self.maxstring = self.maxother = 80

    def repr1(self, x: Any, level: int) -> str:
        # A subclass is shown as its base class; reprlib would call its unbounded __repr__.
        plain = next((kind for kind in (tuple, list, dict, set, str) if isinstance(x, kind)), None)
        if plain:
            return str(getattr(self, f"repr_{plain.__name__}")(x, level))
        return " ".join(super().repr1(x, level).split())  # arrays are shown over several lines

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= MAX_BITS else f"an integer of {x.bit_length()} bits"


brief = _Brief().repr
"""The ``repr`` of a value, limited to a few items, levels and characters."""


@contextlib.contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """A context in which errors name an argument as the user's call does.

    An ordinary word, such as ``strength``, is taken for an argument at the beginning of a message or before ``=``.

    Args:
      names: argument of what is called in the context -> that of the user's call.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):
            raise
        text = str(error)
        for name, own in names.items():
            place = rf"\b{name}\b" if "_" in name else rf"^{name}\b|\b{name}(?==)"
            text = re.sub(place, own, text)
        if text == str(error):
            raise
        raise type(error)(text) from None


_given: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar("warnings given", default=None)


@contextlib.contextmanager
def warning_once() -> Iterator[None]:
    """A context in which equal warnings of :func:`warn` are given once."""
    token = _given.set(set())
    try:
        yield
    finally:
        _given.reset(token)


def warn(text: str) -> None:
    """Emit a warning that points to the user's code: the nearest caller outside this package."""
    if (given := _given.get()) is not None:
        if text in given:
            return
        given.add(text)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == PACKAGE:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
