"""Registries of classes by name, which find the class that a file names, in this package or in user code.

A class is registered when it is defined. A name may be defined again in the same module (a notebook cell that is run
twice); the later class replaces the earlier one. The package's own names are reserved, and looking up a name that two
modules define is an error, because a file does not say which one it means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PACKAGE = __name__.partition(".")[0]


class Registry(Mapping[str, Any]):
    """Name -> class.

    Attributes:
      kind: the kind of its classes in error messages, for example "scheduler".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, dict[str, type[Any]]] = {}  # name -> module -> class

    def register(self, cls: type[Any]) -> None:
        """Register a class under its name.

        Raises:
          ValueError: the class is defined outside this package, which already has one of this name.
        """
        found = self._classes.setdefault(cls.__name__, {})
        ours = next((module for module in found if _is_ours(module)), None)
        if ours and not _is_ours(cls.__module__):
            raise ValueError(
                f"{cls.__module__}.{cls.__name__} has the same name as {ours}.{cls.__name__}, which files refer to by"
                " it; give the class another name"
            )
        found[cls.__module__] = cls

    def find(self, name: str) -> Any:
        """The class of this name.

        Raises:
          ValueError: no imported module defines the name, or two do.
        """
        found = self._classes.get(name, {})
        if not found:
            raise ValueError(
                f"unknown {self.kind} class {name or '(no _class_name)'!r}; known: {', '.join(sorted(self))}; if it is"
                " defined elsewhere, import the module that defines it first"
            )
        if len(found) > 1:
            raise ValueError(
                f"{self.kind} class {name!r} is defined in {' and in '.join(found)}, so its name"
                " is ambiguous; rename one, or call from_pretrained of the class itself"
            )
        return next(iter(found.values()))

    def classes(self) -> Iterator[type[Any]]:
        """All classes, including those that share a name."""
        for found in self._classes.values():
            yield from found.values()

    def __getitem__(self, name: str) -> Any:
        if name not in self._classes:
            raise KeyError(name)
        return self.find(name)

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE
