"""Importing is light, imports run one way, and the public names are where the package says."""

from __future__ import annotations

import ast
import graphlib
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import diffuse_jax

PACKAGE = Path(diffuse_jax.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A part may import parts of a lower level and, where no cycle comes of it, of its own.
LEVELS = {
    "errors": 0,
    "limits": 0,
    "writing": 0,
    "messages": 0,
    "allowed": 0,
    "bounds": 0,
    "config": 0,
    "output": 0,
    "registry": 0,
    "habits": 0,
    "images": 0,
    "fitting": 0,
    "interpolation": 0,
    "rounding": 0,
    "control_images": 0,
    "utils": 0,
    "noise": 0,
    "timing": 0,
    "memory": 0,
    "command": 0,
    "columns": 0,
    "kernels": 1,
    "mesh_axes": 0,
    "sharding": 1,
    "weights": 1,
    "layouts": 1,
    "processors": 2,
    "models": 2,
    "text": 2,
    "schedulers": 2,
    "adapters": 4,
    "pipelines": 5,
    "training": 5,
    "torch_backend": 6,
    "convert": 6,
    "merging": 6,
    "lora_conversion": 6,
    "batch": 6,
    "weights_commands": 6,
    "image_flags": 6,
    "placement_table": 6,
    "batch_command": 6,
    "runs_command": 6,
    "cli": 7,
    "__main__": 8,
}
BASES = {"Model", "Scheduler"}  # not loaded themselves
LONGEST = 600
IMPORT_SECONDS = 0.3
HEAVY = ("torch", "transformers", "datasets", "diffusers", "jax", "flax", "numpy", "PIL", "huggingface_hub", "orbax")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, with ``from a import b`` as ``a.b``."""
    yield from names_in(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def names_in(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The same of parts of a file."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{ast.unparse(node)}: relative imports hide the direction; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_name(path: Path) -> str:
    """``diffuse_jax.weights.names`` of a file, ``diffuse_jax.weights`` of a folder's ``__init__.py``."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def statements(node: ast.AST, *, functions: bool) -> Iterator[ast.AST]:
    """What runs when a module is imported; with ``functions`` also what runs later, and what type checkers read."""
    for child in ast.iter_child_nodes(node):
        if not functions and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from statements(child, functions=functions)


def imported_modules(path: Path, *, functions: bool) -> set[str]:
    """The modules of the package that a file imports; a public name counts as its home."""
    found = set()
    for name in names_in(statements(ast.parse(path.read_text(encoding="utf-8")), functions=functions)):
        owner, _, word = name.rpartition(".")
        home = diffuse_jax._HOME[word] if owner == "diffuse_jax" and word in diffuse_jax._HOME else name
        found |= {home if home in MODULES else owner} & MODULES.keys()
    return found - {module_name(path)}


def check_no_cycle(graph: dict[str, set[str]]) -> None:
    """Raises CycleError with the names."""
    graphlib.TopologicalSorter(graph).prepare()


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


def test_importing_the_package_is_fast() -> None:
    """Processor time of a fresh interpreter, its own start included; the best of five, as others use the machine."""
    code = "import time, diffuse_jax; print(time.process_time())"
    assert min(float(run_python(code)) for _ in range(5)) < IMPORT_SECONDS


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
    check_no_cycle(graph)


def test_modules_import_each_other_without_a_cycle() -> None:
    check_no_cycle({name: imported_modules(path, functions=False) for name, path in MODULES.items()})


LAZY = {"diffuse_jax", "diffuse_jax.torch_backend"}
"""Packages that import what they offer when it is used; type checkers read all of it."""


def test_neither_functions_nor_annotations_hide_a_cycle() -> None:
    """Imports inside functions, and those for type checkers, run one way too."""
    check_no_cycle({name: imported_modules(path, functions=True) for name, path in MODULES.items() if name not in LAZY})


def test_a_cycle_is_found_at_both_depths(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport a\nif TYPE_CHECKING:\n    import b\n"
        "class C:\n    import c\n    def f(self):\n        import d\n"
    )
    named = lambda functions: [*names_in(statements(ast.parse(file.read_text()), functions=functions))]
    assert named(False) == ["typing.TYPE_CHECKING", "a", "c"]
    assert named(True) == ["typing.TYPE_CHECKING", "a", "b", "c", "d"]
    with pytest.raises(graphlib.CycleError, match="x"):
        check_no_cycle({"x": {"y"}, "y": {"x"}})


@pytest.mark.parametrize("folder", ["diffuse_jax", "train", "tpu", "benchmarks", "docs", "tests"])
def test_no_file_is_too_long(folder: str) -> None:
    files = (PACKAGE.parent / folder).rglob("*.py")
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert lengths
    assert not {str(path): n for path, n in lengths.items() if n > LONGEST}, f"over {LONGEST} lines: cut it in two"


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
    loadable |= {"sample", "load_image", "make_image_grid"} & {*home.__all__}
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


def test_no_public_name_hides_a_module() -> None:
    """``import package.name`` and ``package.name`` are one thing: a function is not called like a file beside it."""
    for package in [m.name for m in pkgutil.walk_packages(diffuse_jax.__path__, "diffuse_jax.") if m.ispkg]:
        modules = {m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__)}
        hidden = modules & {*getattr(importlib.import_module(package), "__all__", ())}
        assert not hidden, f"{package}: {hidden} name a module and something else"


def test_the_shipped_files_are_packaged() -> None:
    """The contents of assets/ must match the package data of pyproject.toml, or a wheel would lack the model."""
    import tomllib

    pyproject = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = pyproject["tool"]["setuptools"]["package-data"]["diffuse_jax"]
    packaged = {p for pattern in patterns for p in PACKAGE.glob(pattern) if p.is_file()}
    assets = {p for p in (PACKAGE / "assets").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert assets <= packaged
    assert PACKAGE / "py.typed" in packaged
