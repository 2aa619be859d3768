"""Sphinx: MyST pages, executed notebooks, the API from docstrings, tables from ``docs/results/*.json``."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]

import config_fields  # noqa: E402
import results  # noqa: E402
import systems  # noqa: E402

import diffuse_jax  # noqa: E402

project = "diffuse_jax"
author = "the diffuse_jax authors"
copyright = "the diffuse_jax authors"
release = version = diffuse_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "coverage_check",
]
exclude_patterns = ["_build", "_generated"]
html_theme = "sphinx_book_theme"
html_title = f"diffuse_jax {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]


def repository_url() -> str:
    """The web address of the repository: ``DOCS_REPOSITORY_URL``, else git's ``origin``; empty if that has none."""
    command = ["git", "-C", str(DOCS), "remote", "get-url", "origin"]
    try:
        origin = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git
        origin = ""
    url = os.environ.get("DOCS_REPOSITORY_URL") or re.sub(r"^(?:ssh://)?git@([^:/]+)[:/]", r"https://\1/", origin)
    found = re.fullmatch(r"https://(?:[^/@]*@)?(.+?)(?:\.git)?/?", url)  # an access token before an @ stays private
    return f"https://{found[1]}" if found else ""


html_theme_options = {
    "use_download_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "repository_url": repository_url(),
    "use_repository_button": bool(repository_url()),
}
toc_object_entries_show_parents = "hide"  # the margin is narrow
copybutton_prompt_text = "$ "  # what follows a prompt is copied, output is not
copybutton_line_continuation_character = "\\"
copybutton_exclude = ".linenos, .gp, .go"

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3


def code_state() -> str:
    """A hash of all that notebooks run: what they showed before a change of the library must not stand after it."""
    package = DOCS.parent / "diffuse_jax"
    files = [path for path in sorted(package.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()[:16]


# Notebooks are stored without outputs and run by the build, in a folder of their own; an error ends the build. Their
# outputs are kept for the next build of the same notebook with the same library.
nb_execution_mode = "cache"
nb_execution_cache_path = str(DOCS / "_build" / "notebooks" / code_state())
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_execution_show_tb = True
nb_output_stderr = "remove"  # progress bars and notes of other libraries

autodoc_default_options = {"members": True, "special-members": "__call__", "exclude-members": "setup"}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # one entry may name several


NOISE = (
    (r", parent: [~\w.]*Module \|.*(?=\)$)", ""),  # what Flax adds to every module
    (r"(\w+Config) = \1\(.*?\)(?=, dtype)", r"\1 = \1()"),  # a default configuration, in full
    (r"<class '[\w.]*?(\w+)'>", r"\1"),
    (r" = Adapters\(.*?scale=1\.0\)", " = Adapters()"),
    (r" = <factory>", " = {}"),
    (r" = <[\w.]+ object>", " = ..."),
)
"""What signatures read from dataclasses hold beside what a reader wants: pattern and replacement."""


def tidy_signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, result: str | None
) -> tuple[str, str | None] | None:
    """Signatures without Flax's own arguments and without addresses of objects."""
    if not signature:
        return None
    for pattern, replacement in NOISE:
        signature = re.sub(pattern, replacement, signature)
    if name.endswith("Pipeline.__call__") and result and result.endswith("Request"):  # its signature is compose's
        result = "~diffuse_jax.pipelines.Output"
    return signature, result


COLON = "\ue000"
"""Stands for a colon while Napoleon reads; of Unicode's private area."""


def hide_colons(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """In the docstring of an attribute Napoleon takes what stands before a colon on the first line for its type."""
    if what in ("attribute", "data", "property") and lines:
        lines[0] = lines[0].replace(": ", f"{COLON} ")


def show_colons(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """What :func:`hide_colons` hid."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def keep_flags_whole(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Mark ``--flags``, so that the style sheet can keep lines from ending after their hyphens."""
    for literal in doctree.findall(nodes.literal):
        if literal.astext().startswith("-"):
            literal["classes"].append("flag")


BACK = re.compile(r'(<a class="viewcode-back" href="[^"#]*#)([^"]+)(">\[docs\]</a>)')


def right_backlinks(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Let pages with source lead back to the names that the reference has.

    Sphinx assumes one module for all objects of a file, but some are on the page under the name of their package.
    """
    if page.startswith("_modules/"):
        known, module = app.env.get_domain("py").data["objects"], page.removeprefix("_modules/").replace("/", ".")

        def right(link: re.Match[str]) -> str:
            words = link[2].split(".")
            names = [link[2], *(".".join([module, *words[k:]]) for k in range(1, len(words)))]
            there = next((name for name in names if name in known), None)
            return f"{link[1]}{there}{link[3]}" if there else ""

        context["body"] = BACK.sub(right, context["body"])


def setup(app: Sphinx) -> None:
    """Write the tables before any page is read."""
    app.connect("builder-inited", lambda _: results.write_pages(DOCS / "results", DOCS / "_generated"))
    app.connect("builder-inited", lambda _: config_fields.write_page(DOCS / "_generated"))
    app.connect("builder-inited", lambda _: systems.write_page(DOCS / "_generated"))
    app.connect("doctree-resolved", keep_flags_whole)
    app.connect("html-page-context", right_backlinks)
    app.connect("autodoc-process-signature", tidy_signature)
    app.connect("autodoc-process-docstring", hide_colons, priority=400)  # Napoleon's is 500
    app.connect("autodoc-process-docstring", show_colons, priority=600)
