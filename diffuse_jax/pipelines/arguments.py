"""The numbers among the arguments of a call, checked by their annotations; single ones become Python's own."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffuse_jax.bounds import flag, real, whole
from diffuse_jax.pipelines.inputs import finite
from diffuse_jax.pipelines.options import argument_hints

Reader = Callable[[Any, str], Any]


def numbers(value: Any, name: str) -> Any:
    """A number or a list of numbers, unchanged."""
    finite(value, name)
    return value


READERS: dict[frozenset[Any], Reader] = {
    frozenset((int,)): whole,
    frozenset((float,)): real,
    frozenset((bool,)): flag,
    frozenset((float, Sequence[float])): numbers,
}
"""What an annotation allows besides None -> what reads it."""


def plain_arguments(
    owner: type, compose: Any, args: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call, with every single number as a Python number, also if NumPy's or JAX's was given.

    What has another annotation (text, images, seeds) is returned as it is, and so is None where it is allowed.

    Args:
      owner: the pipeline's class.
      compose: what makes the request; None for the class's own.
      args, options: the positional and keyword arguments of ``compose``.

    Raises:
      ValueError, TypeError: an argument annotated as a number is not one, or not finite.
    """
    hints = argument_hints(owner, compose)
    read = lambda name, value: _reader(hints.get(name))(value, name)
    named = zip(hints, args, strict=False)  # the positional ones come first
    positional = [read(name, value) for name, value in named]
    return [*positional, *args[len(positional) :]], {name: read(name, value) for name, value in options.items()}


def _reader(hint: Any) -> Reader:
    """What reads an argument with this annotation."""
    either = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    reader = READERS.get(frozenset(either) - {types.NoneType}, _unchanged)
    return lambda value, name: value if value is None and types.NoneType in either else reader(value, name)


def _unchanged(value: Any, name: str) -> Any:
    return value
