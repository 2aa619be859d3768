"""A public name that no page documents is a warning, and so fails the build."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from sphinx.application import Sphinx
from sphinx.util import logging

import diffuse_jax

log = logging.getLogger(__name__)


def public_names() -> Iterator[str]:
    """What the package and its subpackages list in ``__all__``, as dotted names."""
    inner = pkgutil.walk_packages(diffuse_jax.__path__, "diffuse_jax.")
    for module in ("diffuse_jax", *(found.name for found in inner if found.ispkg)):
        for name in getattr(importlib.import_module(module), "__all__", ()):
            if not name.startswith("__"):
                yield f"{module}.{name}"


def undocumented(documented: set[str]) -> list[str]:
    """The public names that are not among the last parts of ``documented``, dotted Python names too."""
    seen = {name.rsplit(".", 1)[-1] for name in documented}
    return [name for name in public_names() if name.rsplit(".", 1)[-1] not in seen]


def check(app: Sphinx, env: object) -> None:
    documented = set(app.env.domains.python_domain.objects)
    for name in undocumented(documented):
        log.warning("no page of docs/api documents %s", name, type="coverage")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
