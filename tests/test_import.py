"""Importing is light, imports run one way, and the public names are where the package says."""

from __future__ import annotations

import ast
import graphlib
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffuse_jax

PACKAGE = Path(diffuse_jax.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A part may import parts of a lower level and, where no cycle comes of it, of its own.
LEVELS = {
    "config": 0,
    "kernels": 1,
    "sharding": 1,
    "weights": 1,
    "models": 2,
    "text": 2,
    "schedulers": 2,
    "adapters": 3,
    "pipelines": 4,
    "training": 4,
    "torch_backend": 4,
    "convert": 5,
    "cli": 6,
    "__main__": 7,
}
BASES = {"Model", "Scheduler"}  # not loaded themselves
HEAVY = ("torch", "transformers", "datasets", "diffusers", "jax", "flax", "numpy", "PIL", "huggingface_hub", "orbax")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, with ``from a import b`` as ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    """The part of the package that a file belongs to: a folder or a module directly under the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """The other parts that a file imports; ``from diffuse_jax import DDIMScheduler`` counts as its home."""
    inside = [name.split(".")[1] for name in imports(path) if name.startswith("diffuse_jax.")]
    homes = [diffuse_jax._HOME[word].split(".")[1] if word in diffuse_jax._HOME else word for word in inside]
    return {home for home in homes if home in LEVELS} - {part(path)}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, diffuse_jax; print([m for m in {HEAVY} if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_building_the_parser_imports_nothing_heavy() -> None:
    code = f"import sys, diffuse_jax.cli as c; c.build_parser(); print([m for m in {HEAVY} if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_no_part_loads_torch_or_datasets() -> None:
    parts = [f"diffuse_jax.{p}" for p in LEVELS if p not in ("__main__", "torch_backend") and (PACKAGE / p).exists()]
    code = f"import sys, {', '.join(parts)}; print([m for m in ('torch', 'datasets', 'diffusers') if m in sys.modules])"
    assert run_python(code).strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    assert part(path) in LEVELS, f"{part(path)}: give the new part a level in {__file__}"
    above = {p for p in imported_parts(path) if LEVELS[p] > LEVELS[part(path)]}
    assert not above, f"{path} imports {above} from above it"


def test_parts_import_each_other_without_a_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        if path != PACKAGE / "__init__.py":
            graph.setdefault(part(path), set()).update(imported_parts(path))
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_linen_and_torch_stay_in_their_place(path: Path) -> None:
    names = list(imports(path))
    if part(path) not in ("models", "text"):
        assert not [n for n in names if n.startswith("flax.linen")], "only models/ and text/ import flax.linen"
    if part(path) != "torch_backend":
        torch = [n for n in names if n.split(".")[0] in ("torch", "diffusers", "torchvision")]
        assert not torch, "only torch_backend/ imports torch"


@pytest.mark.parametrize("module", diffuse_jax._PUBLIC)
def test_public_table_is_what_the_modules_offer(module: str) -> None:
    """Each module's ``__all__`` decides; the package repeats the names so that importing stays light."""
    home = importlib.import_module(module)
    loadable = {name for name in home.__all__ if hasattr(getattr(home, name), "from_pretrained")}
    loadable |= {name for name in home.__all__ if isinstance(getattr(home, name), tuple)}  # lists of classes
    assert set(diffuse_jax._PUBLIC[module]) == loadable - BASES


@pytest.mark.parametrize("name", diffuse_jax.__all__)
def test_public_names_resolve_and_are_documented(name: str) -> None:
    value = getattr(diffuse_jax, name)
    assert name in dir(diffuse_jax)
    if not name.startswith("__"):
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'StableDifusionPipeline'"):
        diffuse_jax.StableDifusionPipeline  # noqa: B018


def test_every_module_imports() -> None:
    for module in pkgutil.walk_packages(diffuse_jax.__path__, "diffuse_jax."):
        if module.name != "diffuse_jax.__main__" and ".torch_backend" not in module.name:
            importlib.import_module(module.name)


def test_the_shipped_files_are_packaged() -> None:
    """What lies in assets/ must match the package data of pyproject.toml, or a wheel comes without the model."""
    import tomllib

    pyproject = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = pyproject["tool"]["setuptools"]["package-data"]["diffuse_jax"]
    packaged = {p for pattern in patterns for p in PACKAGE.glob(pattern) if p.is_file()}
    assets = {p for p in (PACKAGE / "assets").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert assets <= packaged
    assert PACKAGE / "py.typed" in packaged
