"""The tables of diffusers' systems: ``docs/systems.toml`` names them, and the library says which are here.

``python docs/_ext/systems.py`` prints the page's tables.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import results

from diffuse_jax.pipelines import PIPELINES, DiffusionPipeline, families

DOCS = Path(__file__).resolve().parents[1]
FIELDS = {"name", "classes", "page", "reason"}


def read(path: Path = DOCS / "systems.toml") -> list[dict[str, Any]]:
    """The sections, each with its ``title`` and ``systems``.

    Raises:
      ValueError: a system has an unknown field, or no class.
    """
    sections = tomllib.loads(path.read_text(encoding="utf-8"))["section"]
    for system in (system for section in sections for system in section["systems"]):
        if unknown := {*system} - FIELDS:
            name = system.get("name")
            raise ValueError(f"{path}: {name} has {', '.join(sorted(unknown))}; expected {', '.join(sorted(FIELDS))}")
        if not system.get("name") or not system.get("classes"):
            raise ValueError(f"{path}: {system} needs a name and classes")
    return sections


def here(system: Mapping[str, Any]) -> list[type[DiffusionPipeline]]:
    """The classes of a system that this library has."""
    return [PIPELINES.find(name) for name in system["classes"] if name in PIPELINES]


def state(system: Mapping[str, Any]) -> str:
    """``yes``, ``2 of 3 classes``, ``not yet``, or why it is not planned."""
    found, named = len(here(system)), len(system["classes"])
    if found:
        return "yes" if found == named else f"{found} of {named} classes"
    return f"not planned: {system['reason']}" if "reason" in system else "not yet"


def difference(system: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The largest mean difference from PyTorch's images, in 1/255; None if no class has been compared."""
    found = [row["largest_mean_difference"] for row in rows if row["pipeline"] in system["classes"]]
    return max(found, default=None)


def lines(classes: Sequence[type[DiffusionPipeline]]) -> int | None:
    """Lines of the files that define the classes and their families; None without classes."""
    modules = {cls.__module__ for cls in classes} | {family_module(cls) for cls in classes if cls.family is not None}
    files = [Path(str(sys.modules[name].__file__)) for name in sorted(modules)]
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) or None


def family_module(cls: type[DiffusionPipeline]) -> str:
    """The module under ``families`` that has the class's family; the class's own if a user's module has it."""
    names = [f"{families.__name__}.{found.name}" for found in pkgutil.iter_modules(families.__path__)]
    is_owner = lambda name: any(value is cls.family for value in vars(importlib.import_module(name)).values())
    return next(filter(is_owner, names), cls.__module__)


def rows(section: Mapping[str, Any], compared: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a section's table."""
    for system in section["systems"]:
        found = here(system)
        page = system.get("page") if found else None
        yield {
            "system": system["name"],
            "classes": ", ".join(f"`{name}`" for name in system["classes"]),
            "here": state(system),
            "page": page and f"{{doc}}`{page}`",
            "difference": difference(system, compared),
            "lines": lines(found),
        }


def page() -> str:
    """The tables of all sections, under their titles."""
    compared = json.loads((DOCS / "results" / "pipeline_parity.json").read_text(encoding="utf-8"))["rows"]
    found = (f"## {section['title']}\n\n{results.table([*rows(section, compared)])}\n" for section in read())
    return "\n".join(found)


def write_page(target: Path) -> None:
    """Write ``systems.md`` to include."""
    target.mkdir(exist_ok=True)
    (target / "systems.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    print(page())
