"""What the fields of a configuration may hold, as their annotations say: types, ranges, and products of sizes.

Plain annotations mean: ``int`` from 1 to 65,536, ``float`` from 0 to 1e9, ``tuple[X, ...]`` up to 64 of X. A field with
other limits has them in its annotation: ``Annotated[float, Range(-1e9, 1e9)]``, or one of the names below.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import types
import typing
from numbers import Integral, Real
from typing import Annotated, Any, NamedTuple

from diffuse_jax.messages import brief

INFINITY = float("inf")


class Range(NamedTuple):
    """The numbers from ``low`` to ``high``, both included; NaN is in no range."""

    low: float
    high: float


class Length(NamedTuple):
    """The maximum length of a tuple."""

    most: int


class Repeats(NamedTuple):
    """The field says how often a part of the network is repeated: by its largest number or, for tuples, its length."""


SIZE = Range(1, 65_536)
AMOUNT = Range(0, 1e9)
FINITE = Range(-sys.float_info.max, sys.float_info.max)
LEVELS = 64
PACKAGE = __name__.partition(".")[0]

Layers = Annotated[int, Range(1, 64), Repeats()]
"""A number of consecutive layers."""
Depth = Annotated[int, Range(0, 64), Repeats()]
"""The same where there may be none."""
Levels = Annotated[tuple[int, ...], Length(16), Repeats()]
"""The width of each level."""
Index = Annotated[int, Range(0, 65_536)]
"""An integer that may be 0: an offset, an index, padding."""
TokenId = Annotated[int, Range(-1, 2**31 - 1)]
Signed = Annotated[float, Range(-1e9, 1e9)]
Positive = Annotated[float, Range(1e-9, 1e9)]
"""A number that something is divided by, or raised to the power of its inverse."""
Share = Annotated[float, Range(0, 1)]

MAX_TEXT = 500
"""Maximum number of characters of a text: a name, never a document."""

MAX_REPEATED = 192
"""Maximum number of layers: the product of all fields that repeat something. Stable Diffusion XL has 60; tracing a
layer takes a few hundredths of a second."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What one field, or one entry of a tuple, may hold; ``anything`` leaves the check to the class."""

    text: bool = False
    flag: bool = False
    none: bool = False
    whole: Range | None = None
    real: Range | None = None
    items: Rule | None = None
    shortest: int = 0
    longest: int = 0
    repeats: bool = False
    anything: bool = False

    def allows(self, value: Any) -> bool:
        """Whether the annotation allows the value's type and range."""
        if value is None:
            return self.none or self.flag or self.anything  # published files have null for false
        if self.anything:
            return True
        if isinstance(value, bool):
            return self.flag
        if isinstance(value, str):
            return self.text and len(value) <= MAX_TEXT
        if isinstance(value, Integral) and abs(int(value)) > sys.float_info.max:  # has no floating-point value
            return False
        if isinstance(value, int | float | Real):
            ranges = (self.whole if isinstance(value, Integral) else None, self.real)
            return any(r is not None and r.low <= value <= r.high for r in ranges)  # type: ignore[operator]
        if type(value) is not tuple or self.items is None:
            return False
        return self.shortest <= len(value) <= self.longest and all(map(self.items.allows, value))

    def repeated(self, value: Any) -> int:
        """How often the value repeats something; 1 if the field does not repeat anything."""
        if isinstance(value, tuple):
            return max([len(value) if self.repeats else 1, *map((self.items or self).repeated, value)])
        return max(1, int(value)) if self.repeats and isinstance(value, Integral) else 1

    def __str__(self) -> str:
        kinds = [
            f"text of up to {MAX_TEXT} characters" if self.text else "",
            "true or false" if self.flag else "",
            "null" if self.none else "",
            f"a whole number from {self.whole.low:,} to {self.whole.high:,}" if self.whole else "",
            f"a number from {self.real.low:g} to {self.real.high:g}" if self.real else "",
        ]
        if self.items:
            count = f"{self.longest}" if self.shortest else f"up to {self.longest:,}"
            kinds.append(f"a list of {count} entries, each {self.items}")
        return " or ".join(filter(None, kinds))


PLAIN: dict[Any, Rule] = {
    int: Rule(whole=SIZE),
    float: Rule(real=AMOUNT),
    str: Rule(text=True),
    bool: Rule(flag=True),
    type(None): Rule(none=True),
}


def rule_of(hint: Any) -> Rule:
    """The rule that an annotation means."""
    arguments = typing.get_args(hint)
    if hint in PLAIN:
        return PLAIN[hint]
    if dataclasses.is_dataclass(hint):  # a configuration inside another checks itself
        return Rule(anything=True)
    if typing.get_origin(hint) is Annotated:
        return functools.reduce(_marked, arguments[1:], rule_of(arguments[0]))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return functools.reduce(_either, map(rule_of, arguments))
    if typing.get_origin(hint) is tuple:
        endless = arguments[-1] is Ellipsis
        shortest, longest = (0, LEVELS) if endless else (len(arguments), len(arguments))
        return Rule(items=rule_of(arguments[0]), shortest=shortest, longest=longest)
    raise TypeError(f"no rule for fields annotated {hint}")


def _marked(rule: Rule, mark: Any) -> Rule:
    """A rule changed by one marker of ``Annotated``."""
    if isinstance(mark, Range):
        return dataclasses.replace(rule, whole=mark) if rule.whole else dataclasses.replace(rule, real=mark)
    if isinstance(mark, Length):
        return dataclasses.replace(rule, longest=mark.most)
    return dataclasses.replace(rule, repeats=True)


def _either(one: Rule, other: Rule) -> Rule:
    """A rule that allows what either rule allows."""
    changes = {f.name: getattr(other, f.name) or getattr(one, f.name) for f in dataclasses.fields(Rule)}
    return Rule(**changes)


@functools.cache
def rules_of(cls: Any) -> dict[str, Rule]:
    """Field -> rule for a configuration class; fields that are always None are left to the class."""
    names = [f.name for f in dataclasses.fields(cls) if f.init and f.name != "extra"]
    owners = {
        name: next(base for base in cls.__mro__ if name in vars(base).get("__annotations__", {})) for name in names
    }
    return {name: _rule_of_field(owners[name], name) for name in names}


def _rule_of_field(owner: Any, name: str) -> Rule:
    """The rule of a field of the class that defines it.

    For a class outside this package, types follow the annotations but only explicit ranges apply: only its author knows
    what its numbers mean, and whether they may be zero or negative.
    """
    if owner.__module__.partition(".")[0] == PACKAGE:
        hint = typing.get_type_hints(owner, include_extras=True)[name]
        return Rule(anything=True) if hint is type(None) else rule_of(hint)
    try:
        return _widened(rule_of(typing.get_type_hints(owner, include_extras=True)[name]))
    except (TypeError, NameError):  # an annotation without a rule, or with a name that is local to a function
        return Rule(anything=True)


def _widened(rule: Rule) -> Rule:
    """The rule without the default ranges, which are only for this package's classes."""
    return dataclasses.replace(
        rule,
        whole=Range(-INFINITY, INFINITY) if rule.whole == SIZE else rule.whole,
        real=FINITE if rule.real == AMOUNT else rule.real,
        items=None if rule.items is None else _widened(rule.items),
    )


def check_fields(config: Any, name: str) -> None:
    """Refuse a configuration with a value of the wrong type or out of range, or with too many layers.

    Args:
      config: the frozen dataclass.
      name: its name in error messages.

    Raises:
      ValueError: the message names the field, its value and what is allowed.
    """
    cls: Any = type(config)
    rules = rules_of(cls)
    for field, rule in rules.items():
        value = getattr(config, field)
        if not rule.allows(value):
            raise ValueError(f"{name}: {field} must be {rule}, got {brief(value)}")
    repeats = {field: rule.repeated(getattr(config, field)) for field, rule in rules.items()}
    if math.prod(repeats.values()) > MAX_REPEATED:
        shown = ", ".join(f"{field}={brief(getattr(config, field))}" for field, n in repeats.items() if n > 1)
        raise ValueError(f"{name}: {shown} together make more than {MAX_REPEATED} layers")
