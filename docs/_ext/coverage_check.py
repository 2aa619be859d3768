"""A public name that no page documents is a warning, and so fails the build."""

from __future__ import annotations

from sphinx.application import Sphinx
from sphinx.util import logging

import diffuse_jax

log = logging.getLogger(__name__)


def undocumented(documented: set[str]) -> list[str]:
    """The public names of the package that are not among the last parts of ``documented``, dotted Python names."""
    seen = {name.rsplit(".", 1)[-1] for name in documented}
    return [name for name in diffuse_jax.__all__ if name not in seen and not name.startswith("__")]


def check(app: Sphinx, env: object) -> None:
    documented = set(app.env.domains.python_domain.objects)
    for name in undocumented(documented):
        log.warning("no page of docs/api documents %s", name, type="coverage")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
