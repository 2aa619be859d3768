"""The table of diffusers' systems says what is here."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from diffuse_jax import pipelines
from diffuse_jax.pipelines import PIPELINES, DiffusionPipeline

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def table() -> Any:
    """The module that makes the table, which imports another one beside it."""
    before = [*sys.path]
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        return importlib.import_module("systems")
    finally:
        sys.path[:] = before


def listed(table: Any) -> list[dict[str, Any]]:
    return [system for section in table.read() for system in section["systems"]]


def test_every_pipeline_is_in_the_table(table: Any) -> None:
    named = {name for system in listed(table) for name in system["classes"]}
    ours = {name for name in pipelines.__all__ if name in PIPELINES} - {DiffusionPipeline.__name__}
    assert len(ours) > 50
    assert not ours - named, "add to docs/systems.toml: " + ", ".join(sorted(ours - named))


def test_what_is_here_has_a_page(table: Any) -> None:
    for system in listed(table):
        if table.here(system):
            page = system.get("page")
            assert page, f"docs/systems.toml: {system['name']} is here; add the page that describes it"
            assert (DOCS / f"{page}.md").is_file()


def test_classes_that_are_not_here_are_those_of_diffusers(table: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    outside = {"TextToVideoIFPipeline"}  # of a user's repository
    experimental = vars(importlib.import_module("diffusers.experimental"))
    for name in {name for system in listed(table) for name in system["classes"]} - {*PIPELINES} - outside:
        assert hasattr(diffusers, name) or name in experimental, f"docs/systems.toml: no class {name}"


def test_systems_are_described_by_the_library(table: Any) -> None:
    two = {"name": "Two", "classes": ["LDMTextToImagePipeline", "DiTPipeline"], "page": "latent-diffusion"}
    none = {"name": "None", "classes": ["DiTPipeline"], "reason": "because"}
    compared = [{"pipeline": "LDMTextToImagePipeline", "largest_mean_difference": 0.25}]
    first, second = table.rows({"systems": [two, none]}, compared)
    assert (first["here"], first["page"], first["difference"]) == ("1 of 2 classes", "{doc}`latent-diffusion`", 0.25)
    root = DOCS.parent / "diffuse_jax" / "pipelines"
    files = (root / "latent_diffusion_text.py", root / "families" / "latent_diffusion.py")
    assert first["lines"] == sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert second == {
        "system": "None",
        "classes": "`DiTPipeline`",
        "here": "not planned: because",
        "page": None,
        "difference": None,
        "lines": None,
    }
    assert table.state({"classes": ["DiTPipeline"]}) == "not yet"


def test_a_misspelt_field_is_named(table: Any, tmp_path: Path) -> None:
    file = tmp_path / "systems.toml"
    for text, message in [
        ('name = "A", classes = ["B"], pages = "c"', "A has pages; expected classes, name, page, reason"),
        ('name = "A"', "needs a name and classes"),
    ]:
        file.write_text(f'[[section]]\ntitle = "T"\nsystems = [{{ {text} }}]\n')
        with pytest.raises(ValueError, match=message):
            table.read(file)
