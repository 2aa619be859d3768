"""Every ``python`` block of README and the documentation runs; tables and pages are complete."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import jax
import pytest

import diffuse_jax
from diffuse_jax.pipelines.programs import PROGRAMS
from tests.memory import free_programs

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WRITTEN = [p for p in sorted(DOCS.rglob("*.md")) if not any(part.startswith("_") for part in p.relative_to(DOCS).parts)]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *WRITTEN]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HIDDEN = re.compile(r"<!--.*?-->", re.DOTALL)


def load(path: Path) -> ModuleType:
    """A module from a file that is on no import path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


results = load(DOCS / "_ext" / "results.py")


def blocks(page: Path) -> list[tuple[int, str]]:
    """The python blocks of a page, each with the line before its first."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(1)), m[1]) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, in one namespace and in an empty folder; a failure points at the line of the page."""
    monkeypatch.chdir(tmp_path)
    # A page that saves its programs saves all of its own and none of other tests, and does not decide how they compile.
    saves = any("_compiled(" in code for _, code in blocks(page))
    for name, empty in {"_to_save": [], "_folders": [], **({"_programs": {}} if saves else {})}.items():
        monkeypatch.setattr(PROGRAMS, name, empty)
    names: dict[str, object] = {"__name__": "__main__"}
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    try:
        for line, code in blocks(page):
            own = compile("\n" * line + code, str(page), "exec", dont_inherit=True)  # annotations as a script has them
            exec(own, names)
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)  # one page names another folder
        names.clear()
        free_programs()


def test_the_blocks_are_found() -> None:
    assert {"README.md", "index.md", "quickstart.md", "concepts.md"} <= {p.name for p in PAGES if blocks(p)}


def sampled_with(page: Path) -> set[str]:
    """The classes whose pipelines a page opens, and then calls, in blocks that readers see."""
    shown = HIDDEN.sub("", page.read_text(encoding="utf-8"))
    opened: dict[str, set[str]] = {}
    called = set()
    for node in ast.walk(ast.parse("\n".join(BLOCK.findall(shown)))):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            first = re.match(r"(\w+)\.from_\w+\(", ast.unparse(node.value))
            if first:
                opened.setdefault(ast.unparse(node.targets[0]), set()).add(first[1])
        elif isinstance(node, ast.Call):
            called.add(ast.unparse(node.func))
    return set().union(*(kinds for name, kinds in opened.items() if name in called))


def test_every_pipeline_has_an_example() -> None:
    """The classes that choose another one (``AutoPipeline...``, ``DiffusionPipeline``) have one too."""
    shown = set().union(*map(sampled_with, PAGES))
    missing = [name for name in diffuse_jax.__all__ if "Pipeline" in name and name not in shown]
    assert not missing, "show on a page how to open and call " + ", ".join(missing)


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = set()
    for page in WRITTEN:
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            listed |= {(page.parent / line.strip()).with_suffix("") for line in tree.splitlines() if line[:1].isalnum()}
    assert {page.with_suffix("") for page in (*WRITTEN, *NOTEBOOKS)} - {DOCS / "index"} == listed


def test_notebooks_are_stored_without_outputs() -> None:
    """The build runs them; what they show is then what this version does."""
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs"), f"{path.name} has outputs; clear them before committing"
            assert cell.get("execution_count") is None, f"{path.name} was saved after a run"


def test_notebooks_import_what_exists() -> None:
    """The build runs them whole; here a name that has moved is found in a second."""
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                code = ast.parse("".join(cell["source"]), path.name)
                code.body = [line for line in code.body if isinstance(line, ast.Import | ast.ImportFrom)]
                exec(compile(code, path.name, "exec"), {})


def test_links_between_pages_resolve() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_public_name_is_on_an_api_page() -> None:
    """The build checks each name; this checks that its module is listed, without building."""
    listed = set(re.findall(r"automodule:: (\S+)", "".join(p.read_text() for p in (DOCS / "api").glob("*.md"))))
    assert set(diffuse_jax._PUBLIC) <= listed


def test_results_are_well_formed_and_readme_is_current() -> None:
    found = results.read(DOCS / "results")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results.fill(readme, found) == readme, "run: python docs/_ext/results.py"


def test_a_result_becomes_a_table(tmp_path: Path) -> None:
    rows = [{"model": "a|b", "seconds": 0.12345, "same": True}, {"model": "c", "bytes": 12345.0, "shape": [1, 2]}]
    (tmp_path / "speed.json").write_text(
        json.dumps({"title": "Speed", "about": "How.", "machine": {"cpu_cores": 2}, "rows": rows})
    )
    results.write_pages(tmp_path, tmp_path / "out")
    page = (tmp_path / "out" / "speed.md").read_text()
    assert page.splitlines() == [
        "How.",
        "",
        "| model | seconds | same | bytes | shape |",
        "| --- | --- | --- | --- | --- |",
        "| a\\|b | 0.123 | yes | – | – |",
        "| c | – | – | 12,345 | 1, 2 |",
        "",
        "Measured on: cpu cores 2.",
    ]
    assert (tmp_path / "out" / "all.md").read_text() == f"## Speed\n\n{page}"
    filled = results.fill("x\n<!-- results: speed -->\nold\n<!-- end results -->\ny", results.read(tmp_path))
    assert "old" not in filled
    assert "| c | – | – | 12,345 | 1, 2 |\n<!-- end results -->\ny" in filled
    few = results.fill("<!-- results: speed seconds model -->\n<!-- end results -->", results.read(tmp_path))
    assert few.splitlines()[1:-1] == ["| seconds | model |", "| --- | --- |", "| 0.123 | a\\|b |", "| – | c |"]
    one = results.fill("<!-- results: speed model=c bytes -->\n<!-- end results -->", results.read(tmp_path))
    assert one.splitlines()[3:-1] == ["| c | 12,345 |"]
    with pytest.raises(ValueError, match="model=d"):
        results.fill("<!-- results: speed model=d -->\n<!-- end results -->", results.read(tmp_path))


def test_a_wide_table_states_once_what_is_the_same_in_every_row() -> None:
    columns = {f"column_{i}": i for i in range(results.MOST_COLUMNS)}
    page = results.section({"title": "Wide", "rows": [columns | {"seconds": 1}, columns | {"seconds": 2}]})
    assert page.startswith("The same in every row: column 0: 0; column 1: 1;")
    assert "| seconds |\n| --- |\n| 1 |\n| 2 |" in page
    narrow = [{"device": "cpu", "seconds": 1}, {"device": "cpu", "seconds": 2}]
    assert "| device | seconds |" in results.section({"title": "Narrow", "rows": narrow})


def test_an_estimate_stands_with_its_interval() -> None:
    rows = [{"share": {"value": 0.31234, "interval": [0.27, 0.36]}}]
    assert results.table(rows).splitlines()[-1] == "| 0.312 (0.27–0.36) |"


def test_a_malformed_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"odd\.json.*'title'"):
        results.read(tmp_path)
