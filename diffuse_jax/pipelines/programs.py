"""Compiled programs: each is compiled once per process, and can be saved to disk for later processes.

A program is a pure function ``fn(method, *arguments)`` with a static, hashable ``method``. Compiling is explicit, so it
can be counted, done ahead of time and saved. The key in memory consists of the function, the method, the mesh, the
shapes and placement of the arguments, and the context of the call (JAX settings, layer changes). Two closures from the
same factory, or two classes of the same name, are therefore two programs; see
:mod:`~diffuse_jax.pipelines.identity`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffuse_jax.kernels import compiler_options
from diffuse_jax.messages import warn
from diffuse_jax.pipelines import saved_programs
from diffuse_jax.pipelines.identity import Context, identity
from diffuse_jax.pipelines.saved_programs import Key, UnstableReprError, placement
from diffuse_jax.sharding import automatic_shardings
from diffuse_jax.writing import expanded

ROWS = PartitionSpec("data")


class Programs:
    """Compiled executables in memory and, with :meth:`save` and :meth:`load`, in a folder.

    Attributes:
      compilations: how many programs this object has compiled, not counting those loaded from a folder.
    """

    def __init__(self) -> None:
        self.compilations = 0
        self._programs: dict[Key, Any] = {}
        self._to_save: list[tuple[Key, Any, Callable[[], Any]]] = []
        self._folders: list[Path] = []
        self._lock = threading.RLock()

    def get(
        self,
        fn: Callable[..., Any],
        method: Any,
        mesh: Mesh | None,
        specs: tuple[Any, ...],
        args: Any,
        signature: Any = None,
    ) -> Any:
        """The executable of ``fn(method, *args)``, to be called with arguments of the same shapes.

        Args:
          fn: the function.
          method: its static argument.
          mesh: run ``fn`` on each device's shard of the ``data`` axis; None runs it where the arguments are.
          specs: with a mesh, one ``PartitionSpec`` per argument (a prefix of its tree).
          args: the arguments, as arrays or as ``jax.ShapeDtypeStruct``.
          signature: the signature of the arguments, if the caller already has it; see :func:`signature_of`.

        Raises:
          TypeError: the method cannot be compared with other methods.
        """
        signature = signature_of(args) if signature is None else signature
        key = Key(fn, method, mesh, specs, signature, Context.now())
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]  # for debugging: nothing is compiled or cached
            return _bound(key)
        name = key._replace(method=identity(method))
        if name not in self._programs:
            with self._lock:  # threads that ask for one program wait for the first of them to compile it
                if name not in self._programs:
                    self._programs[name] = self._saved(key, args) or self._compile(key, args)
        return self._programs[name]

    def _saved(self, key: Key, args: Any) -> Any:
        """The saved program, or None if no folder has it."""
        if not self._folders:
            return None
        try:
            name = saved_programs.file_name(key, args)
        except UnstableReprError:
            return None
        files = [folder / name for folder in self._folders]
        found = next((file for file in files if file.exists()), None)
        return None if found is None else saved_programs.read(found, args, key.mesh)

    def _compile(self, key: Key, args: Any) -> Any:
        shapes = jax.tree.map(_shape_of, args)
        # Without this, the compiler may shard results along the other axes too, differently in each program.
        out = None if key.mesh is None else NamedSharding(key.mesh, ROWS)
        options = compiler_options(attached=True)
        # Jitted anew each time: a program that JAX has found in its compilation cache cannot be serialized.
        build = lambda: jax.jit(_bound(key), out_shardings=out, compiler_options=options).lower(*shapes).compile()
        self.compilations += 1
        if self._folders or not saved_programs.compilation_cache_in_use():  # then it can be serialized as it is
            with saved_programs.without_compilation_cache():
                program = build()
            self._to_save.append((key, shapes, lambda: program))
        else:
            program = build()
            self._to_save.append((key, shapes, build))
        return program

    def save(self, folder: Path | str) -> list[Path]:
        """Write every program that this object has compiled, and return the new files.

        A program whose method contains a closure, a lambda or a third-party network is skipped with a warning: it has
        no description that is stable across processes.
        """
        folder = saved_programs.require_trusted(expanded(folder), make=True)
        files = []
        for key, shapes, build in self._to_save:
            try:
                file = folder / saved_programs.file_name(key, shapes)
            except UnstableReprError as error:
                warn(f"a program was not saved: {error}")
                continue
            if not file.exists():
                saved_programs.write(file, build)
                files.append(file)
        return files

    def load(self, folder: Path | str) -> None:
        """Look for saved programs in ``folder`` before compiling. They are executable code, so the folder must be
        trusted.

        Raises:
          PermissionError: other users can write to the folder.
        """
        self._folders.append(saved_programs.require_trusted(expanded(folder)))

    def clear(self) -> None:
        """Free the memory of all programs, those of :meth:`load` included; the next call compiles again, or loads."""
        with self._lock:
            self._programs.clear()
            self._to_save.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Programs:
        return self  # executables are shared: they contain no pipeline data

    def __reduce__(self) -> Any:
        return _programs_of_process, ()  # executables cannot leave their process


def signature_of(args: Any) -> Any:
    """The properties of arguments that a program depends on: tree structure, shapes, dtypes and placement."""
    leaves, tree = jax.tree.flatten(args)
    return tree, tuple([(x.shape, x.dtype, placement(x)) for x in leaves])


def _shape_of(array: Any) -> jax.ShapeDtypeStruct:
    sharding = automatic_shardings(placement(array))
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _bound(key: Key) -> Callable[..., Any]:
    """The function with its method bound, mapped over the shards of the ``data`` axis if there is a mesh.

    Inside, each device sees only its own images, so no kernel needs to know about the mesh. The other axes (``fsdp``,
    ``tensor``, ``sequence``) are left to the compiler, which follows the placement of the parameters.
    """
    fn, method, mesh, specs = key.fn, key.method, key.mesh, key.specs

    def bound(*args: Any) -> Any:
        return fn(method, *args)

    bound.__name__ = fn.__name__
    if mesh is None:
        return bound
    return jax.shard_map(bound, mesh=mesh, in_specs=specs, out_specs=ROWS, axis_names={"data"}, check_vma=False)


PROGRAMS = Programs()
"""The programs of this process, shared by all pipelines: two pipelines of the same architecture compile only once."""


def _programs_of_process() -> Programs:
    return PROGRAMS
