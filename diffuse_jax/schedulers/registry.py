"""Every scheduler class by name, so that a ``scheduler_config.json`` finds the class that it names.

A class enters the registry when it is defined, wherever that is. A name may be defined again in the same module (a cell
of a notebook that is run twice); the later class counts. The package's own names cannot be taken, and a name that two
modules define is refused when it is looked up, because nothing in a configuration says which of them is meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PACKAGE = __name__.partition(".")[0]

_CLASSES: dict[str, dict[str, type[Any]]] = {}
"""Class name -> module -> class."""


def register(cls: type[Any]) -> None:
    """Enter a class under its name.

    Raises:
      ValueError: the class is defined outside the package and the package has one of this name.
    """
    found = _CLASSES.setdefault(cls.__name__, {})
    ours = next((module for module in found if _is_ours(module)), None)
    if ours and not _is_ours(cls.__module__):
        raise ValueError(
            f"{cls.__module__}.{cls.__name__} has the name of {ours}.{cls.__name__}, which configurations mean by it;"
            " give the class another name"
        )
    found[cls.__module__] = cls


def scheduler_class(name: str) -> type[Any]:
    """The scheduler class of this name, the package's or one that was defined elsewhere.

    Raises:
      ValueError: no module that has been imported defines the name, or two do.
    """
    found = _CLASSES.get(name, {})
    if not found:
        raise ValueError(
            f"unknown scheduler class {name or '(no _class_name)'!r}; known: {', '.join(known())}; if it is defined"
            " elsewhere, import the module that defines it first"
        )
    if len(found) > 1:
        raise ValueError(
            f"scheduler class {name!r} is defined in {' and in '.join(found)}, and its name alone does not say which"
            " is meant; rename one, or call from_pretrained or from_config of the class itself"
        )
    return next(iter(found.values()))


def known() -> list[str]:
    """The names of all scheduler classes that can be built, sorted."""
    return sorted(_CLASSES)


def classes() -> Iterator[type[Any]]:
    """All of them."""
    for found in _CLASSES.values():
        yield from found.values()


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE
