"""Patterns for layer names from PEFT's settings, matched as data in a bounded number of steps.

PEFT compiles them as regular expressions. Those of published files are names, or use a few of the forms below; matching
them with :mod:`re` would let a file choose an expression that takes forever. Here a set of positions moves through the
pattern, so that no path is tried twice, and the steps are counted.
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
"""Maximum number of positions visited per comparison; a pattern of a published file visits about a hundred."""

PLAIN = re.compile(r"[\w.\-]*")
"""Patterns that are plain names; the dot still stands for any character."""
ATOM = re.compile(r"\\[dDwWsS]|\\[^\w\s]|\[\^?\]?(?:\\[dws\-\].]|[^\\\[\]])*\]|[^\\\[\](){}*+?|^$]")
"""Matches one character: a class, an escape, or the character itself."""


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a layer's name, or the end of the name after any dot, as in PEFT.

    Args:
      pattern: letters, ``.``, ``[a-z]``, ``\\d``, ``*``, ``+``, ``?``, ``|``, ``^``, ``$`` and parentheses.
      name: the layer's dotted name.

    Raises:
      ValueError: the pattern has an unsupported form, or needs too many steps; says which.
    """
    begins = {0, *(i + 1 for i, letter in enumerate(name) if letter == ".")}
    if PLAIN.fullmatch(pattern):
        begin = len(name) - len(pattern)
        return begin in begins and all(a in (".", b) for a, b in zip(pattern, name[begin:], strict=True))
    return len(name) in _Matcher(name).after(_parse(pattern), begins)


class _Matcher:
    """Moves sets of positions through a parsed pattern."""

    def __init__(self, name: str) -> None:
        self.name, self.steps = name, 0

    def after(self, node: Any, begins: Iterable[int]) -> set[int]:
        """The positions that a node's matches reach from any of these positions."""
        kind, part = node
        begins = set(begins)
        self.steps += len(begins)
        if self.steps > MAX_STEPS:
            raise ValueError(f"matching it takes more than {MAX_STEPS} steps")
        if kind == "one":
            return {i + 1 for i in begins if i < len(self.name) and part.fullmatch(self.name[i])}
        if kind == "^":
            return begins & {0}
        if kind == "$":
            return begins & {len(self.name)}
        if kind == "alternatives":
            return set().union(*(self.after(child, begins) for child in part))
        if kind == "sequence":
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
        raise ValueError(f"it has {len(pattern)} characters; the maximum is {MAX_LENGTH}")
    node, at = _alternatives(pattern, 0, 0)
    if at != len(pattern):
        raise ValueError(f"{brief(pattern[at:])} has no meaning there")
    return node


def _alternatives(pattern: str, at: int, depth: int) -> tuple[Any, int]:
    if depth > MAX_NESTING:
        raise ValueError(f"parentheses are nested more than {MAX_NESTING} levels deep")
    sequence, at = _sequence(pattern, at, depth)
    sequences = [sequence]
    while pattern[at : at + 1] == "|":
        sequence, at = _sequence(pattern, at + 1, depth)
        sequences.append(sequence)
    return ("alternatives", sequences), at


def _sequence(pattern: str, at: int, depth: int) -> tuple[Any, int]:
    parts: list[Any] = []
    while at < len(pattern) and pattern[at] not in "|)":
        node, at = _item(pattern, at, depth)
        if pattern[at : at + 1] in ("*", "+", "?"):
            node, at = (pattern[at], node), at + 1
        parts.append(node)
    return ("sequence", parts), at


def _item(pattern: str, at: int, depth: int) -> tuple[Any, int]:
    letter = pattern[at]
    if letter in "^$":
        return (letter, None), at + 1
    if letter == "(":
        begin = at + 3 if pattern.startswith("(?:", at) else at + 1
        node, at = _alternatives(pattern, begin, depth + 1)
        if pattern[at : at + 1] != ")":
            raise ValueError("a parenthesis is not closed")
        return node, at + 1
    found = ATOM.match(pattern, at)
    if not found:
        raise ValueError(f"{brief(pattern[at:])} has no meaning there")
    try:
        return ("one", re.compile(found[0], re.DOTALL)), found.end()
    except re.error as error:
        raise ValueError(f"{brief(found[0])} is not a valid character class ({error})") from error
