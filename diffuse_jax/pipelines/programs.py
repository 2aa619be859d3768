"""Compiled programs: each compiled once in a process, and kept on disk for the next one if the user wants.

A program is a pure function ``fn(task, *arguments)`` with a static, hashable ``task``. Compiling is explicit, so it
can be counted, done ahead of time and saved. What a program was compiled for (shapes, shardings, mesh, versions) is its
key; a saved program whose key does not match is simply not found, and is compiled again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import platform
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, PartitionSpec

import diffuse_jax
from diffuse_jax.sharding import automatic_shardings

SUFFIX = ".jaxprogram"


class Programs:
    """Executables by key, in memory and (once :meth:`save` or :meth:`load` named it) in a folder.

    Attributes:
      compilations: how many programs this object has compiled; saved ones that were loaded do not count.
    """

    def __init__(self) -> None:
        self.compilations = 0
        self._programs: dict[str, Any] = {}
        self._to_save: dict[str, Callable[[], Any]] = {}
        self._folders: list[Path] = []

    def get(self, fn: Callable[..., Any], task: Any, mesh: Mesh | None, specs: tuple[Any, ...], args: Any) -> Any:
        """The executable of ``fn(task, *args)``; call it with arguments of the same shapes.

        Args:
          fn: a module-level function.
          task: its static argument.
          mesh: run ``fn`` on each device's part of the ``data`` axis; None runs it where the arguments are.
          specs: with a mesh, one ``PartitionSpec`` per argument (a prefix of its tree).
          args: the arguments, as arrays or as ``jax.ShapeDtypeStruct``.
        """
        key = program_key(fn, task, mesh, args)
        if key not in self._programs:
            saved = next((f for f in (folder / (key + SUFFIX) for folder in self._folders) if f.exists()), None)
            program = None if saved is None else _read(saved, args, mesh)
            self._programs[key] = self._compile(key, fn, task, mesh, specs, args) if program is None else program
        return self._programs[key]

    def _compile(self, key: str, fn: Any, task: Any, mesh: Mesh | None, specs: tuple[Any, ...], args: Any) -> Any:
        shapes = jax.tree.map(_shape_of, args)
        build = lambda: jax.jit(_bind(fn, task, mesh, specs)).lower(*shapes).compile()
        self.compilations += 1
        if self._folders:  # it will be saved: compile what can be saved, see without_compilation_cache
            with without_compilation_cache():
                program = build()
            self._to_save[key] = lambda: program
        else:
            program = build()
            self._to_save[key] = build
        return program

    def save(self, folder: Path | str) -> list[Path]:
        """Write every program that gives one array (all but those of step-by-step runs); returns the new files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for key, build in self._to_save.items():
            file = folder / (key + SUFFIX)
            if not file.exists() and self._programs[key].out_tree == ONE_ARRAY:
                with without_compilation_cache():
                    _write(file, serialize_executable.serialize(build())[0])
                files.append(file)
        return files

    def load(self, folder: Path | str) -> None:
        """Look in ``folder`` before compiling. Only name a folder that you trust: a program is executable code."""
        self._folders.append(Path(folder))


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Compile afresh. On CPU an executable that came out of JAX's own cache runs, but cannot be serialized again:
    its copy fails with "function not found"."""
    config: Any = jax.config  # only some releases declare its options
    before = config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _shape_of(array: Any) -> jax.ShapeDtypeStruct:
    sharding = automatic_shardings(getattr(array, "sharding", None))
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


ONE_ARRAY = jax.tree.structure(0)
PROGRAMS = Programs()
"""The programs of this process; pipelines share them, so two pipelines of one architecture compile once."""


def program_key(fn: Callable[..., Any], task: Any, mesh: Mesh | None, args: Any) -> str:
    """A hash of all that a program depends on: code, libraries, platform, mesh, static task, shapes, shardings."""
    leaves, tree = jax.tree.flatten(args)
    describe = lambda x: (x.shape, str(x.dtype), str(getattr(x, "sharding", None)) if mesh is not None else None)
    devices = jax.devices() if mesh is None else list(mesh.devices.flat)
    facts = (
        (diffuse_jax.__version__, jax.__version__, jaxlib.__version__, platform.machine(), _source_state()),
        (devices[0].platform, devices[0].device_kind, len(jax.devices()), os.environ.get("XLA_FLAGS", "")),
        [
            getattr(jax.config, f"jax_{name}")
            for name in ("default_matmul_precision", "enable_x64", "default_prng_impl")
        ],
        (_described(fn), _described(task)),
        None if mesh is None else (mesh.shape_tuple, [d.id for d in mesh.devices.flat]),
        (str(tree), [describe(leaf) for leaf in leaves]),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:40]


def _described(value: Any) -> str:
    """A text that is the same in every process; the ``repr`` of a function is not."""
    if isinstance(value, types.FunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ", ".join(f"{f.name}={_described(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__qualname__}({fields})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    return repr(value)


def _source_state() -> str:
    """Names, sizes and times of the package's files, so that an edited checkout does not run yesterday's programs."""
    global _SOURCE_STATE
    if _SOURCE_STATE is None:
        root = Path(__file__).resolve().parents[1]
        stats = [(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(root.rglob("*.py"))]
        _SOURCE_STATE = hashlib.sha256(repr(stats).encode()).hexdigest()
    return _SOURCE_STATE


_SOURCE_STATE: str | None = None


def _bind(fn: Callable[..., Any], task: Any, mesh: Mesh | None, specs: tuple[Any, ...]) -> Callable[..., Any]:
    """``fn`` with its task, on each part of the ``data`` axis if there is a mesh.

    Inside, a device sees its own pictures only, so no kernel needs to know of the mesh; other axes of the mesh
    (``fsdp``, ``tensor``) are left to the compiler, which follows the placement of the parameters.
    """

    def bound(*args: Any) -> Any:
        return fn(task, *args)

    bound.__name__ = fn.__name__
    if mesh is None:
        return bound
    out = PartitionSpec("data")
    return jax.shard_map(bound, mesh=mesh, in_specs=specs, out_specs=out, axis_names={"data"}, check_vma=False)


def _read(file: Path, args: Any, mesh: Mesh | None) -> Any:
    """A saved program, or None (with a warning) where this machine cannot load it."""
    in_tree = jax.tree.structure((args, {}))
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    try:
        data = file.read_bytes()
        return serialize_executable.deserialize_and_load(data, in_tree, ONE_ARRAY, execution_devices=devices)
    except Exception as error:
        warnings.warn(f"{file} could not be loaded and is compiled again: {error}", stacklevel=2)
        return None


def _write(file: Path, data: bytes) -> None:
    """Write under a temporary name, then rename: an interrupted save leaves no half program."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".part")
    with os.fdopen(handle, "wb") as out:
        out.write(data)
    os.replace(name, file)
