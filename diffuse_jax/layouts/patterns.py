"""Patterns for the names of layers, as PEFT's settings have them: read as data, in a bounded number of steps.

PEFT compiles them as regular expressions. Those of published files are names, or use a few of the forms below; matching
them with :mod:`re` would let a file choose an expression that never ends. Here a set of positions moves through the
pattern, so that no way through the name is tried twice, and the steps are counted.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

from diffuse_jax.messages import brief

MAX_LENGTH = 500
MAX_NESTING = 8
MAX_STEPS = 2000
"""Positions that one comparison may visit; a pattern of a published file visits about a hundred."""

PLAIN = re.compile(r"[\w.\-]*")
"""Names; the dot still stands for any character."""
ATOM = re.compile(r"\\[dDwWsS]|\\[^\w\s]|\[\^?\]?(?:\\[dws\-\].]|[^\\\[\]])*\]|[^\\\[\](){}*+?|^$]")
"""One character: a class, an escape, or itself."""


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means a layer; as PEFT does, it may be the end of the name, from any dot on.

    Args:
      pattern: letters, ``.``, ``[a-z]``, ``\\d``, ``*``, ``+``, ``?``, ``|``, ``^``, ``$`` and parentheses.
      name: of the layer, with dots.

    Raises:
      ValueError: the pattern has another form, or asks for too many steps; the text says which.
    """
    begins = {0, *(i + 1 for i, letter in enumerate(name) if letter == ".")}
    if PLAIN.fullmatch(pattern):
        begin = len(name) - len(pattern)
        return begin in begins and all(a in (".", b) for a, b in zip(pattern, name[begin:], strict=True))
    return len(name) in _Walk(name).after(_parse(pattern), begins)


class _Walk:
    """Moves sets of positions through a parsed pattern."""

    def __init__(self, name: str) -> None:
        self.name, self.steps = name, 0

    def after(self, node: Any, begins: Iterable[int]) -> set[int]:
        """The positions behind what a node matches from any of these positions."""
        kind, part = node
        begins = set(begins)
        self.steps += len(begins)
        if self.steps > MAX_STEPS:
            raise ValueError(f"it takes more than {MAX_STEPS} steps")
        if kind == "one":
            return {i + 1 for i in begins if i < len(self.name) and part.fullmatch(self.name[i])}
        if kind == "^":
            return begins & {0}
        if kind == "$":
            return begins & {len(self.name)}
        if kind == "either":
            return set().union(*(self.after(child, begins) for child in part))
        if kind == "row":
            return functools.reduce(lambda at, child: self.after(child, at), part, begins)
        if kind == "?":
            return begins | self.after(part, begins)
        return self._many(part, begins if kind == "*" else self.after(part, begins))

    def _many(self, part: Any, begins: set[int]) -> set[int]:
        found, new = set(begins), begins
        while new:
            new = self.after(part, new) - found
            found |= new
        return found


@functools.lru_cache(maxsize=4096)
def _parse(pattern: str) -> Any:
    """A pattern as nested ``(kind, parts)``."""
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"it has {len(pattern)} characters; the most are {MAX_LENGTH}")
    node, at = _either(pattern, 0, 0)
    if at != len(pattern):
        raise ValueError(f"{brief(pattern[at:])} has no meaning there")
    return node


def _either(pattern: str, at: int, depth: int) -> tuple[Any, int]:
    if depth > MAX_NESTING:
        raise ValueError(f"parentheses are nested more than {MAX_NESTING} deep")
    row, at = _row(pattern, at, depth)
    rows = [row]
    while pattern[at : at + 1] == "|":
        row, at = _row(pattern, at + 1, depth)
        rows.append(row)
    return ("either", rows), at


def _row(pattern: str, at: int, depth: int) -> tuple[Any, int]:
    parts: list[Any] = []
    while at < len(pattern) and pattern[at] not in "|)":
        node, at = _one(pattern, at, depth)
        if pattern[at : at + 1] in ("*", "+", "?"):
            node, at = (pattern[at], node), at + 1
        parts.append(node)
    return ("row", parts), at


def _one(pattern: str, at: int, depth: int) -> tuple[Any, int]:
    letter = pattern[at]
    if letter in "^$":
        return (letter, None), at + 1
    if letter == "(":
        begin = at + 3 if pattern.startswith("(?:", at) else at + 1
        node, at = _either(pattern, begin, depth + 1)
        if pattern[at : at + 1] != ")":
            raise ValueError("a parenthesis is not closed")
        return node, at + 1
    found = ATOM.match(pattern, at)
    if not found:
        raise ValueError(f"{brief(pattern[at:])} has no meaning there")
    try:
        return ("one", re.compile(found[0], re.DOTALL)), found.end()
    except re.error as error:
        raise ValueError(f"{brief(found[0])} is no class of characters ({error})") from error
