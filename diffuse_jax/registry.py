"""Classes by name: a file finds the class that it names, of the package or of the user.

A class enters a registry when it is defined, wherever that is. A name may be defined again in the same module (a cell
of a notebook that is run twice); the later class counts. The package's own names cannot be taken, and a name that two
modules define is refused when it is looked up, because nothing in a file says which of them is meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PACKAGE = __name__.partition(".")[0]


class Registry(Mapping[str, Any]):
    """Name -> class.

    Attributes:
      kind: what errors call its classes, for example "scheduler".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, dict[str, type[Any]]] = {}  # name -> module -> class

    def register(self, cls: type[Any]) -> None:
        """Enter a class under its name.

        Raises:
          ValueError: the class is defined outside the package and the package has one of this name.
        """
        found = self._classes.setdefault(cls.__name__, {})
        ours = next((module for module in found if _is_ours(module)), None)
        if ours and not _is_ours(cls.__module__):
            raise ValueError(
                f"{cls.__module__}.{cls.__name__} has the name of {ours}.{cls.__name__}, which files mean by it;"
                " give the class another name"
            )
        found[cls.__module__] = cls

    def find(self, name: str) -> Any:
        """The class of this name.

        Raises:
          ValueError: no module that has been imported defines the name, or two do.
        """
        found = self._classes.get(name, {})
        if not found:
            raise ValueError(
                f"unknown {self.kind} class {name or '(no _class_name)'!r}; known: {', '.join(sorted(self))}; if it is"
                " defined elsewhere, import the module that defines it first"
            )
        if len(found) > 1:
            raise ValueError(
                f"{self.kind} class {name!r} is defined in {' and in '.join(found)}, and its name alone does not say"
                " which is meant; rename one, or call from_pretrained of the class itself"
            )
        return next(iter(found.values()))

    def classes(self) -> Iterator[type[Any]]:
        """All classes, those that share a name too."""
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
