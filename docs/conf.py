"""Sphinx: MyST pages, the API from docstrings, tables from ``docs/results/*.json``."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]

import results  # noqa: E402

import diffuse_jax  # noqa: E402

project = "diffuse_jax"
author = "the diffuse_jax authors"
copyright = "the diffuse_jax authors"
release = version = diffuse_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "coverage_check",
]
exclude_patterns = ["_build", "_generated"]
html_theme = "sphinx_book_theme"
html_title = "diffuse_jax"
html_theme_options = {"use_download_button": False, "show_toc_level": 2}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def setup(app: Sphinx) -> None:
    """Write the tables before any page is read."""
    app.connect("builder-inited", lambda _: results.write_pages(DOCS / "results", DOCS / "_generated"))
