"""Meshes, logical axes of parameters, and where arrays go.

A parameter's path says which logical axes it has (``LOGICAL_AXES``, first match wins); ``RULES`` say which axis of the
mesh each logical axis is cut along. Both are data; a user may pass other rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

LOGICAL_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(to_[qkv]|[qkv]_proj)/kernel$", ("embed", "heads")),
    (r"(to_out_0|out_proj)/kernel$", ("heads", "embed")),
    (r"(net_0/proj|fc1)/kernel$", ("embed", "mlp")),
    (r"(net_2|fc2)/kernel$", ("mlp", "embed")),
    (r"(token|position)_embedding/embedding$", (None, "embed")),
)
"""``(regular expression over the path, logical axes)``; what matches nothing is described by its rank alone."""

BY_RANK: dict[int, tuple[str | None, ...]] = {2: ("embed", None), 4: (None, None, None, "channels")}

RULES: Mapping[str, str] = {"embed": "fsdp", "channels": "fsdp", "heads": "tensor", "mlp": "tensor"}
"""Logical axis -> mesh axis."""


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes ``data, fsdp, tensor, sequence``; one of the sizes may be -1, "all that remain".

    ``devices`` are all of JAX's if left out. Nothing is cut along ``sequence`` unless rules of your own say so.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor, sequence]
    fixed = math.prod(s for s in sizes if s != -1)
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes) or len(devices) % fixed:
        raise ValueError(
            f"a mesh of {dict(zip(MESH_AXES, sizes, strict=True))} does not fit {len(devices)} devices: the sizes must "
            "be positive and divide that number, and one of them may be -1"
        )
    sizes = [len(devices) // fixed if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"a mesh of {dict(zip(MESH_AXES, sizes, strict=True))} takes {math.prod(sizes)} devices, but there are "
            f"{len(devices)}; set one of the sizes to -1 or give devices=jax.devices()[:{math.prod(sizes)}]"
        )
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def automatic(mesh: Mesh) -> Mesh:
    """The same devices with axes over which the compiler divides the work, as pipelines and training steps expect.

    The axes of ``jax.make_mesh`` are explicit in recent versions of JAX: every operation would have to say how its
    result is cut.
    """
    return Mesh(mesh.devices, mesh.axis_names)


def automatic_shardings(tree: Tree) -> Tree:
    """A tree of shardings with each mesh as :func:`automatic` makes it; other leaves stay as they are."""

    def convert(s: Any) -> Any:
        on_mesh = isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)
        return NamedSharding(automatic(s.mesh), s.spec, memory_kind=s.memory_kind) if on_mesh else s

    return jax.tree.map(convert, tree)


def on_automatic_axes(fun: Callable[..., Any], args: tuple[Any, ...], *, batch: Any = ()) -> Any:
    """``fun(*args)``, where the compiler divides the work along the axes that are explicit outside.

    The mesh is the current one (``jax.set_mesh``, ``jax.shard_map``), else that of the first array with explicit axes.
    Where there are none, this is just the call.

    Args:
      fun: a function of trees; an array that it closes over needs :func:`to_current_mesh`.
      args: its arguments; leaves that are not arrays are passed on as they are.
      batch: those trees among them that hold arrays ``[B,...]``. The first of these that is sharded along its first
        axis decides how results ``[B,...]`` are; all others are replicated along the explicit axes.

    Raises:
      ValueError: arrays are on different meshes.
    """
    mesh = _mesh_to_compute_on(args)
    if mesh is None:
        return fun(*args)
    with jax.sharding.use_abstract_mesh(mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))):
        out = fun(*to_current_mesh(args))
    if not mesh.explicit_axes:
        return out
    size, axes = _sharded_batch(batch, mesh)

    def place(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        spec = PartitionSpec(axes) if x.ndim and x.shape[0] == size else PartitionSpec()
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, out)


def to_current_mesh(tree: Tree) -> Tree:
    """The same arrays for the current mesh, where they are on its devices but its axes have other types.

    Raises:
      ValueError: an array is on a mesh with other axes.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def move(x: Any) -> Any:
        source = _mesh_of(x)
        if source.empty or mesh.empty or source == mesh:
            return x
        if source.shape_tuple != mesh.shape_tuple:
            raise ValueError(
                f"an array {list(x.shape)} is on a mesh {dict(source.shape)}, but jax.set_mesh or another array uses "
                f"{dict(mesh.shape)}; put parameters and inputs on one mesh with jax.device_put(x, NamedSharding(...))"
            )
        return jax.sharding.reshard(x, PartitionSpec())  # automatic axes are left open: nothing moves

    return jax.tree.map(move, tree)


def _mesh_to_compute_on(tree: Any) -> AbstractMesh | None:
    """The mesh, if explicit axes are involved at all."""
    current = jax.sharding.get_abstract_mesh()
    if current.explicit_axes:
        return current
    explicit = next((mesh for mesh in map(_mesh_of, jax.tree.leaves(tree)) if mesh.explicit_axes), None)
    return explicit if explicit is None or current.empty else current


def _mesh_of(x: Any) -> AbstractMesh:
    return jax.typeof(x).sharding.mesh if isinstance(x, jax.Array) else _NO_MESH


_NO_MESH = AbstractMesh((), ())


def _sharded_batch(tree: Any, mesh: AbstractMesh) -> tuple[int | None, Any]:
    """The first axis of the first array that is sharded there along explicit axes of the mesh, and these axes."""
    kinds = (jax.typeof(x) for x in jax.tree.leaves(tree) if _mesh_of(x) == mesh)
    sharded = ((kind.shape[0], kind.sharding.spec[0]) for kind in kinds if kind.ndim and kind.sharding.spec[0])
    return next(sharded, (None, None))


def param_spec(
    path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Mapping[str, str] = RULES
) -> PartitionSpec:
    """How the parameter at ``path`` (joined with ``/``) is cut; an axis that does not divide evenly stays whole."""
    named = (axes for pattern, axes in LOGICAL_AXES if re.search(pattern, path) and len(axes) == len(shape))
    logical = next(named, BY_RANK.get(len(shape), (None,) * len(shape)))
    spec = [rules.get(name) if name else None for name in logical]
    fits = lambda axis, size: axis in mesh.shape and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0
    return PartitionSpec(*(axis if fits(axis, size) else None for axis, size in zip(spec, shape, strict=True)))


def param_shardings(shapes: Any, mesh: Mesh, rules: Mapping[str, str] = RULES) -> Any:
    """The tree of ``NamedSharding`` for a tree of shapes (``Model.shapes()``) or of arrays.

    Explicit axes of the mesh stay explicit, so the parameters can be used together with other arrays on this mesh.
    The tree may hold parameters deeper inside, as a training state does: an optimiser's moments are cut like the
    parameters that they belong to, and what has no such path is whole on every device.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def gathered(path: Sequence[str], kernel: jax.Array) -> jax.Array:
    """All of a parameter that is stored cut along ``fsdp``, at the place where a layer uses it.

    Its gradient is cut along ``fsdp`` again, so what each device gets of the sum is its part. Left alone, the compiler
    may also keep the parameter cut and divide the layer's work by channels, which moves activations between devices and
    holds those of the whole batch. Does nothing unless the current mesh (``jax.set_mesh``, or that of
    :func:`diffuse_jax.training.state.make_step`) has an automatic axis ``fsdp``.

    Args:
      path: names from the root of the parameters to this one.
      kernel: in the dtype that should travel between devices.
    """
    if "fsdp" not in automatic_axes():
        return kernel
    cut = param_spec("/".join(path), kernel.shape, jax.sharding.get_abstract_mesh())
    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in cut))
    return kernel if whole == cut else _gather(kernel, cut, whole)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, cut: PartitionSpec, whole: PartitionSpec) -> jax.Array:
    # Cut first: the compiler might else gather what a cast to a narrower dtype was made from.
    return lax.with_sharding_constraint(lax.with_sharding_constraint(x, cut), whole)


def _gather_forward(x: jax.Array, cut: PartitionSpec, whole: PartitionSpec) -> tuple[jax.Array, None]:
    return _gather(x, cut, whole), None


def _gather_backward(cut: PartitionSpec, whole: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Whole first: asked for a part at once, the compiler may gather the batch to compute just that.
    return (lax.with_sharding_constraint(lax.with_sharding_constraint(gradient, whole), cut),)


_gather.defvjp(_gather_forward, _gather_backward)


def cut_batch(x: jax.Array) -> jax.Array:
    """``x [B,...]`` with its first axis cut along ``data`` and ``fsdp`` of the current mesh, where they divide it."""
    mesh, axes = jax.sharding.get_abstract_mesh(), automatic_axes()
    over = tuple(axis for axis in ("data", "fsdp") if axis in axes)
    if not over or x.shape[0] % math.prod(mesh.shape[axis] for axis in over):
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return lax.with_sharding_constraint(x, PartitionSpec(over, *free))


def automatic_axes() -> set[str]:
    """Axes of the current mesh that have more than one device and are left to the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1}


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether the mesh has devices that this process does not own (a pod slice, several GPU machines)."""
    return mesh is not None and any(d.process_index != jax.process_index() for d in mesh.devices.flat)


def readable(tree: Any) -> Any:
    """The same numbers where this process can read them all; if they lie on several, all of these must call it."""
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True) if is_global(x) else x, tree)


def is_global(x: Any) -> bool:
    """Whether parts of an array are on devices of other processes."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def train_batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches of training, ``[accumulation steps, B, ...]``: the second axis is cut along ``data`` and ``fsdp``."""
    return NamedSharding(automatic(mesh), PartitionSpec(None, tuple(a for a in ("data", "fsdp") if a in mesh.shape)))
