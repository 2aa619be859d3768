"""Validation of training settings: ranges of numbers, paths, and names from a list.

A range is written once, in the annotation of a settings field (``learning_rate: Annotated[float, NONNEGATIVE]``). The
flag of the same name has the same range.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffuse_jax.bounds import Number


@functools.cache
def numbers_of(kind: type) -> Mapping[str, Number]:
    """The fields of a dataclass that have a :class:`~diffuse_jax.bounds.Number` in their annotation: such numbers, or
    tuples of them."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {field.name: _number(hints[field.name]) for field in dataclasses.fields(kind)}
    return {name: number for name, number in found.items() if number is not None}


def _number(hint: Any) -> Number | None:
    """The :class:`~diffuse_jax.bounds.Number` in an annotation such as ``Annotated[int, COUNT] | None``."""
    inside = (*getattr(hint, "__metadata__", ()), *map(_number, typing.get_args(hint)))
    return next((part for part in inside if isinstance(part, Number)), None)


@functools.cache
def paths_of(kind: type) -> tuple[str, ...]:
    """The fields of a dataclass with ``Path`` in their annotation: paths or Hub ids, or tuples of them."""
    hints = typing.get_type_hints(kind)
    return tuple(field.name for field in dataclasses.fields(kind) if _has_path(hints[field.name]))


def _has_path(hint: Any) -> bool:
    return hint is Path or any(map(_has_path, typing.get_args(hint)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """Base class of settings, which checks their numbers and paths on construction. None, where allowed, means unset.

    Raises:
      ValueError: a number is out of range, or a path is empty; the message names the first one.
    """

    def __post_init__(self) -> None:
        for name, number in numbers_of(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if one is not None and not number.allows(one):
                    raise ValueError(f"{name} must be {number.words}, got {one}")
        for name in paths_of(type(self)):  # type: ignore[arg-type]
            if "" in (value if isinstance(value := getattr(self, name), tuple) else (value,)):
                raise ValueError(f"{name} must not be empty; the current folder is '.'")


def one_of(choices: Iterable[str], **values: str | None) -> None:
    """Check that each value is one of the choices, or None.

    Raises:
      ValueError: a value is not; the message names the setting and the choices.
    """
    known = list(choices)
    for name, value in values.items():
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
