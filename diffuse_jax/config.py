"""Frozen, hashable configurations that read and write the JSON of diffusers and transformers.

A configuration is a plain frozen dataclass. Its fields have the names and the defaults of the JSON keys, so a file
that leaves a key out means the same here as in PyTorch. Unknown keys are kept (``extra``) and written back, so reading
and saving a folder loses nothing. A configuration never depends on files, the environment or devices. Every value is
checked when a configuration is created: see :mod:`diffuse_jax.allowed`.

Each key that diffusers or transformers has is one of three things: a field that is honoured, a key for which only one
value is implemented and others are refused (:attr:`Config.fixed`), or one without influence on the result
(:attr:`Config.harmless`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from diffuse_jax.allowed import check_fields
from diffuse_jax.messages import brief


def freeze(value: Any) -> Any:
    """JSON value -> hashable value: lists become tuples, objects become tuples of sorted ``(key, value)`` pairs."""
    if isinstance(value, FrozenDict):
        return value
    if isinstance(value, Mapping):
        return FrozenDict((k, freeze(v)) for k, v in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(freeze(v) for v in value)
    return value


def thaw(value: Any) -> Any:
    """The inverse of :func:`freeze`: tuples become lists and frozen objects become dicts."""
    if isinstance(value, FrozenDict):
        return {k: thaw(v) for k, v in value}
    if isinstance(value, tuple):
        return [thaw(v) for v in value]
    return value


NOT_QUANTIZED: Mapping[str, Any] = {"quantization_config": None}
"""The entry of :attr:`Config.fixed` of every network: quantized weights are not supported."""


NO_DROPOUT = "for training, which warns if it is not 0: dropout is never applied"
"""Why a network's dropout does not affect results."""


class FrozenDict(tuple):
    """A JSON object as a hashable tuple of ``(key, value)`` pairs; :func:`thaw` turns it back into a dict."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of all configurations.

    Attributes:
      extra: JSON keys that the class has no field for, frozen; written back by :meth:`to_json`. They do not affect the
        network, so comparisons ignore them, and checkpoints of one architecture share their compiled programs.
    """

    extra: FrozenDict = dataclasses.field(default=FrozenDict(), compare=False)

    class_name: ClassVar[str] = ""
    """The ``_class_name`` in the JSON of this configuration; empty if the format has no such key."""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """Keys that change the result -> the only value that is implemented; they have no fields."""
    harmless: ClassVar[Mapping[str, str]] = {}
    """Keys, some of them fields, that do not change the result -> why."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, freeze(getattr(self, field.name)))
        name, options = self.class_name or type(self).__name__, dict(self.extra)
        check_fields(self, name)
        for key, value in self.fixed.items():
            if options.get(key, freeze(value)) != freeze(value):
                given = brief(thaw(options[key]))
                raise ValueError(f"{name}: {key}={given} is not supported, only {value!r} (or leave it out)")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Build from the object in ``config.json`` or ``scheduler_config.json``; unknown keys go to ``extra``."""
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        fields = {k: v for k, v in data.items() if k in known}
        return cls(**fields, extra=freeze({k: v for k, v in data.items() if k not in known}))

    def to_json(self) -> dict[str, Any]:
        """The JSON object that diffusers or transformers would read: every field, then the unknown keys."""
        fields = {f.name: thaw(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "extra"}
        head = {"_class_name": self.class_name} if self.class_name else {}
        return head | fields | {k: v for k, v in thaw(self.extra).items() if k != "_class_name"}

    def unknown(self) -> dict[str, Any]:
        """Keys of ``extra`` that this release does not know; they may be important."""
        known = {*self.fixed, *self.harmless}
        return {k: thaw(v) for k, v in self.extra if k not in known and not k.startswith("_")}

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; unknown names are an error."""
        return dataclasses.replace(self, **changes)
