"""Compiled programs on disk: file names, writing and reading.

A file's name is a hash of everything that the program depends on, so a program is found only if all of it matches. A
file contains executable code: it is read only if it is complete and no other user can write to its folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import pickle
import platform
import stat
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

import diffuse_jax
from diffuse_jax.messages import warn
from diffuse_jax.pipelines.identity import Context
from diffuse_jax.writing import atomic_file

SUFFIX = ".jaxprogram"
MAGIC = b"diffuse_jax program 2\n"
DIGEST = hashlib.sha256().digest_size


class Key(NamedTuple):
    """What a program is compiled for. Programs in memory are compared by the key itself, files by a hash of its
    text."""

    fn: Callable[..., Any]
    method: Any
    mesh: Mesh | None
    specs: tuple[Any, ...]
    signature: Any
    context: Context


def placement(array: Any) -> Any:
    """The sharding that a program is compiled for; None for NumPy arrays and uncommitted arrays, which JAX may move."""
    return getattr(array, "sharding", None) if getattr(array, "committed", True) else None


def devices_of(args: Any, mesh: Mesh | None) -> list[jax.Device]:
    """The devices of a program: those of the mesh, else of a committed argument, else JAX's default device."""
    if mesh is not None:
        return list(mesh.devices.flat)
    placed = (sharding for sharding in map(placement, jax.tree.leaves(args)) if sharding is not None)
    default = jax.device_put(np.zeros(())).sharding  # jnp.zeros would be compiled
    return sorted(next(placed, default).device_set, key=lambda device: device.id)


class UnstableReprError(ValueError):
    """A method contains a value without a string representation that is stable across processes."""


def file_name(key: Key, args: Any) -> str:
    """The file name of a program.

    Raises:
      UnstableReprError: the method contains a closure, or an object of an unknown kind.
    """
    leaves, tree = jax.tree.flatten(args)
    mesh = key.mesh
    devices = devices_of(args, mesh)
    facts = (
        (diffuse_jax.__version__, jax.__version__, jaxlib.__version__, platform.machine(), _source_state()),
        (devices[0].platform, devices[0].device_kind, len(jax.devices()), os.environ.get("XLA_FLAGS", "")),
        (repr(key.context.settings), key.context.platform, str(key.context.mesh), stable_repr(key.context.changes)),
        (stable_repr(key.fn), stable_repr(key.method)),
        None if mesh is None else (mesh.shape_tuple, [d.id for d in mesh.devices.flat]),
        (str(tree), [(x.shape, str(x.dtype), str(placement(x))) for x in leaves]),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:40] + SUFFIX


PRIMITIVES = (type(None), bool, int, float, complex, str, bytes, np.dtype, np.generic)


def stable_repr(value: Any) -> str:
    """A string that is the same in every process, and different if the program could be.

    Raises:
      UnstableReprError: the value is a closure, a lambda, or an object identified only by its address.
    """
    if isinstance(value, PRIMITIVES):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"({', '.join(map(stable_repr, value))})"
    if isinstance(value, types.FunctionType | type):
        return _source_of(value)
    if dataclasses.is_dataclass(value):
        fields = ", ".join(
            f"{f.name}={stable_repr(getattr(value, f.name))}" for f in dataclasses.fields(value) if f.compare
        )
        return f"{_source_of(type(value))}({fields})"
    raise UnstableReprError(f"{value!r} has no representation that is the same in every process")


def _source_of(value: Any) -> str:
    """Module and name of a class or function, with a hash of the source for user code, which may change."""
    name = f"{value.__module__}.{value.__qualname__}"
    if "<lambda>" in name or "<locals>" in name:
        raise UnstableReprError(f"{name} is a closure; define it at module level")
    if _named(value.__module__, value.__qualname__) is not value:
        raise UnstableReprError(f"{value!r} is not the object that {name} names, so the name does not identify it")
    if value.__module__.partition(".")[0] in ("diffuse_jax", "builtins", "jax", "flax", "numpy", "ml_dtypes"):
        return name
    return f"{name}#{_user_sources(value)}"


def _named(module: str, name: str) -> Any:
    """What is found in a module under a (dotted) name, or None; as pickle looks for it."""
    try:
        return functools.reduce(getattr, name.split("."), sys.modules[module])
    except (AttributeError, KeyError):
        return None


def _user_sources(value: Any) -> str:
    """A hash of the user's source files (not this package or installed ones) that a class or function depends on.

    Raises:
      UnstableReprError: it is not defined in a file.
    """
    owners = value.__mro__ if isinstance(value, type) else (value,)
    new, found = {owner.__module__ for owner in owners}, dict[str, str]()
    while new:
        module = sys.modules.get(name := new.pop())
        file = getattr(module, "__file__", None)
        if module is None or (file is None and name not in sys.builtin_module_names):
            raise UnstableReprError(f"{value.__qualname__} has no source file, so changes to it could not be detected")
        if file is None or name in found or _is_installed(name, file):
            continue
        found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        inside = vars(module).values()
        names = {x.__name__ if isinstance(x, types.ModuleType) else getattr(x, "__module__", None) for x in inside}
        new |= {x for x in names if isinstance(x, str) and x in sys.modules} - {*found}
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def _is_installed(name: str, file: str) -> bool:
    """Whether a module belongs to this package, to Python or to an installed package, whose sources are not hashed."""
    installed = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    return name.partition(".")[0] == "diffuse_jax" or file.startswith(installed)


def _source_state() -> str:
    """A hash of names, sizes and modification times of this package's files, so an edited checkout never reuses stale
    programs."""
    global _SOURCE_STATE
    if _SOURCE_STATE is None:
        root = Path(__file__).resolve().parents[1]
        stats = [(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(root.rglob("*.py"))]
        _SOURCE_STATE = hashlib.sha256(repr(stats).encode()).hexdigest()
    return _SOURCE_STATE


_SOURCE_STATE: str | None = None


def require_trusted(folder: Path, *, make: bool = False) -> Path:
    """Return the folder after checking that only its owner (this user or root) can write to it.

    Raises:
      PermissionError: other users can write to it, so a program in it could be anybody's code.
    """
    if make:
        folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    if not folder.exists() or not hasattr(os, "getuid"):
        return folder
    found = folder.stat()
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others or found.st_uid not in (0, os.getuid()):
        why = "other users can write to it" if others else f"it belongs to user {found.st_uid}"
        raise PermissionError(
            f"{folder}: {why}, and compiled programs are executable code; use a folder that only you can write "
            f"to (chmod go-w {folder})"
        )
    return folder


def write(file: Path, build: Callable[[], Any]) -> None:
    """Write the executable that ``build`` returns, atomically."""
    with without_compilation_cache():
        payload, _, out_tree = serialize_executable.serialize(build())
    data = pickle.dumps((payload, out_tree))
    with atomic_file(file, mode=0o644) as partial:  # with a umask of 002, `read` would refuse the group-writable file
        partial.write(MAGIC + hashlib.sha256(data).digest() + data)


def read(file: Path, args: Any, mesh: Mesh | None) -> Any:
    """A saved program, or None (with a warning) if it is damaged or cannot be loaded on this machine.

    Raises:
      PermissionError: other users can write to the file or its folder.
    """
    require_trusted(require_trusted(file.parent) / file.name)
    devices = devices_of(args, mesh)
    try:
        data = file.read_bytes()
        digest, body = data[len(MAGIC) : len(MAGIC) + DIGEST], data[len(MAGIC) + DIGEST :]
        if not data.startswith(MAGIC) or hashlib.sha256(body).digest() != digest:
            raise ValueError("the file is damaged or from another version")
        payload, out_tree = pickle.loads(body)  # code, like the program itself: hence the trusted folder
        in_tree = jax.tree.structure((args, {}))
        return serialize_executable.deserialize_and_load(payload, in_tree, out_tree, execution_devices=devices)
    except Exception as error:
        warn(f"{file} could not be loaded, so the program is compiled again: {error}")
        return None


def compilation_cache_in_use() -> bool:
    """Whether JAX keeps what it compiles in a folder, or takes it from there."""
    config: Any = jax.config
    return bool(config.jax_compilation_cache_dir) and config.jax_enable_compilation_cache


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Disable JAX's compilation cache. On CPU, an executable loaded from that cache runs but cannot be serialized
    again: loading the copy fails with "function not found"."""
    config: Any = jax.config  # not all releases declare its options
    before = config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
