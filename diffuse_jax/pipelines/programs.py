"""Compiled programs: each compiled once in a process, and kept on disk for the next one if the user wants.

A program is a pure function ``fn(method, *arguments)`` with a static, hashable ``method``. Compiling is explicit, so it
can be counted, done ahead of time and saved. In memory a program is found by the function, the method, the mesh, the
shapes, the placement of the arguments and what is active around the call (settings of JAX, changes of layers): two
closures of one factory, or two classes of one name, are two programs. See :mod:`~diffuse_jax.pipelines.identity`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from diffuse_jax.messages import warn
from diffuse_jax.pipelines import saved_programs
from diffuse_jax.pipelines.identity import Context, identity
from diffuse_jax.pipelines.saved_programs import Key, NotDescribable, placement
from diffuse_jax.sharding import automatic_shardings


class Programs:
    """Executables in memory and (once :meth:`save` or :meth:`load` named it) in a folder.

    Attributes:
      compilations: how many programs this object has compiled; saved ones that were loaded do not count.
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
        """The executable of ``fn(method, *args)``; call it with arguments of the same shapes.

        Args:
          fn: a function.
          method: its static argument.
          mesh: run ``fn`` on each device's part of the ``data`` axis; None runs it where the arguments are.
          specs: with a mesh, one ``PartitionSpec`` per argument (a prefix of its tree).
          args: the arguments, as arrays or as ``jax.ShapeDtypeStruct``.
          signature: of the arguments, where the caller has it; see :func:`signature_of`.

        Raises:
          TypeError: the method cannot be compared with others.
        """
        signature = signature_of(args) if signature is None else signature
        key = Key(fn, method, mesh, specs, signature, Context.now())
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]  # for debugging: nothing is compiled or kept
            return _bound(key)
        name = key._replace(method=identity(method))
        if name not in self._programs:
            with self._lock:  # threads that ask for one program wait for the first of them to compile it
                if name not in self._programs:
                    self._programs[name] = self._saved(key, args) or self._compile(key, args)
        return self._programs[name]

    def _saved(self, key: Key, args: Any) -> Any:
        """The program from a folder, or None."""
        if not self._folders:
            return None
        try:
            name = saved_programs.file_name(key, args)
        except NotDescribable:
            return None
        files = [folder / name for folder in self._folders]
        found = next((file for file in files if file.exists()), None)
        return None if found is None else saved_programs.read(found, args, key.mesh)

    def _compile(self, key: Key, args: Any) -> Any:
        shapes = jax.tree.map(_shape_of, args)
        build = lambda: jax.jit(_bound(key)).lower(*shapes).compile()
        self.compilations += 1
        if self._folders:  # it will be saved: compile what can be saved
            with saved_programs.without_compilation_cache():
                program = build()
            self._to_save.append((key, shapes, lambda: program))
        else:
            program = build()
            self._to_save.append((key, shapes, build))
        return program

    def save(self, folder: Path | str) -> list[Path]:
        """Write every program that this object compiled; returns the new files.

        A program whose method holds a closure, a lambda or a third-party network is left out with a warning: nothing
        that stays the same in the next process tells it from another.
        """
        folder = saved_programs.trusted(Path(folder), make=True)
        files = []
        for key, shapes, build in self._to_save:
            try:
                file = folder / saved_programs.file_name(key, shapes)
            except NotDescribable as error:
                warn(f"a program was not saved: {error}")
                continue
            if not file.exists():
                saved_programs.write(file, build)
                files.append(file)
        return files

    def load(self, folder: Path | str) -> None:
        """Look in ``folder`` before compiling. Only name a folder that you trust: a program is executable code.

        Raises:
          PermissionError: others may write to the folder.
        """
        self._folders.append(saved_programs.trusted(Path(folder)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Programs:
        return self  # executables are shared: they hold no data of a pipeline

    def __reduce__(self) -> Any:
        return _programs_of_process, ()  # executables stay in their process


def signature_of(args: Any) -> Any:
    """What a program depends on of its arguments: their tree, shapes, dtypes and placement."""
    leaves, tree = jax.tree.flatten(args)
    return tree, tuple([(x.shape, x.dtype, placement(x)) for x in leaves])


def _shape_of(array: Any) -> jax.ShapeDtypeStruct:
    sharding = automatic_shardings(placement(array))
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _bound(key: Key) -> Callable[..., Any]:
    """The function with its method, on each part of the ``data`` axis if there is a mesh.

    Inside, a device sees its own images only, so no kernel needs to know of the mesh; other axes of the mesh
    (``fsdp``, ``tensor``) are left to the compiler, which follows the placement of the parameters.
    """
    fn, method, mesh, specs = key.fn, key.method, key.mesh, key.specs

    def bound(*args: Any) -> Any:
        return fn(method, *args)

    bound.__name__ = fn.__name__
    if mesh is None:
        return bound
    out = PartitionSpec("data")
    return jax.shard_map(bound, mesh=mesh, in_specs=specs, out_specs=out, axis_names={"data"}, check_vma=False)


PROGRAMS = Programs()
"""The programs of this process; pipelines share them, so two pipelines of one architecture compile once."""


def _programs_of_process() -> Programs:
    return PROGRAMS
