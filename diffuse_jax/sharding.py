"""Meshes, logical axes of parameters, and the sharding of arrays.

A parameter's path determines its logical axes (``LOGICAL_AXES``, first match wins); ``RULES`` map each logical axis to
the mesh axis that it is sharded along. Both are data; users may pass other rules.
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

from diffuse_jax.bounds import whole
from diffuse_jax.mesh_axes import MESH_AXES, parse_axes, with_data

Tree = TypeVar("Tree")

LOGICAL_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(to_[qkv]|to_[kv]_ip|[qkv]_proj)/kernel$", ("embed", "heads")),
    (r"(to_out_0|out_proj)/kernel$", ("heads", "embed")),
    (r"attention/(query|key|value)/kernel$", ("embed", "heads")),
    (r"attention/output/dense/kernel$", ("heads", "embed")),
    (r"(net_0/proj|fc1|intermediate/dense)/kernel$", ("embed", "mlp")),
    (r"(net_2|fc2|output/dense)/kernel$", ("mlp", "embed")),
    (r"(token|position)_embedding/embedding$", (None, "embed")),
)
"""``(regular expression for the path, logical axes)``; without a match, ``BY_RANK`` applies."""

BY_RANK: dict[int, tuple[str | None, ...]] = {2: ("embed", None), 4: (None, None, None, "channels")}

RULES: Mapping[str, str] = {"embed": "fsdp", "channels": "fsdp", "heads": "tensor", "mlp": "tensor"}
"""Logical axis -> mesh axis."""


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes ``data, fsdp, tensor, sequence``; one of the sizes may be -1, for all remaining devices.

    ``devices`` defaults to ``jax.devices()``. Along ``sequence``, images are divided by rows and long attention by
    queries.

    Raises:
      ValueError: the sizes are no integers, or do not multiply to the number of devices, or there is no device.
    """
    devices = jax.devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("a mesh needs at least one device, got devices=[]")
    sizes = [whole(size, axis) for axis, size in zip(MESH_AXES, (data, fsdp, tensor, sequence), strict=True)]
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


def parse_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that a text such as ``"data=4,fsdp=2"`` describes, over ``devices`` (all of them by default).

    An axis that is not named has size 1, except ``data``, which takes the devices that the other axes leave. Wherever
    the library takes ``mesh=``, it takes such a text too.

    Raises:
      ValueError: the text is not of this form, or the sizes do not multiply to the number of devices.
    """
    return make_mesh(**with_data(parse_axes(text)), devices=devices)


def abstract_mesh(text: str) -> AbstractMesh:
    """The mesh that a text describes, of devices that need not be there; only a size of -1 counts those that are.

    Raises:
      ValueError: as for :func:`parse_mesh`.
    """
    sizes = parse_axes(text)
    if -1 in sizes.values():
        return parse_mesh(text).abstract_mesh
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


def as_mesh(mesh: Mesh | str | None) -> Mesh | None:
    """A mesh from what a caller passed as ``mesh=``: a mesh, or the text of one for :func:`parse_mesh`.

    Raises:
      ValueError: as for :func:`parse_mesh`.
    """
    return parse_mesh(mesh) if isinstance(mesh, str) else mesh


def automatic(mesh: Mesh) -> Mesh:
    """The same mesh with automatic axes, where the compiler partitions the work, as pipelines and training expect.

    The axes of ``jax.make_mesh`` are explicit in recent versions of JAX: every operation would have to specify how its
    result is sharded.
    """
    return Mesh(mesh.devices, mesh.axis_names)


def mesh_of_images(mesh: Mesh | str | None) -> Mesh | None:
    """The mesh of a pipeline (:func:`as_mesh`), over which its images can be divided; None is no mesh.

    Raises:
      ValueError: the mesh has no axis ``data``, or as for :func:`parse_mesh`.
    """
    mesh = as_mesh(mesh)
    if mesh is not None and "data" not in mesh.shape:
        sizes, names = (1, *mesh.shape.values()), ("data", *mesh.shape)
        raise ValueError(
            f"a pipeline divides images along the mesh axis 'data', but the mesh has only {dict(mesh.shape)}; rename "
            f"an axis, or add one: jax.make_mesh({sizes}, {names})"
        )
    return mesh


def automatic_shardings(tree: Tree) -> Tree:
    """A tree of shardings with :func:`automatic` applied to each mesh; other leaves are unchanged."""

    def convert(s: Any) -> Any:
        on_mesh = isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)
        return NamedSharding(automatic(s.mesh), s.spec, memory_kind=s.memory_kind) if on_mesh else s

    return jax.tree.map(convert, tree)


def on_automatic_axes(fun: Callable[..., Any], args: tuple[Any, ...], *, batch: Any = ()) -> Any:
    """``fun(*args)`` with the mesh's explicit axes made automatic, so that the compiler partitions the work along them.

    The mesh is the current one (``jax.set_mesh``, ``jax.shard_map``), else that of the first array with explicit axes.
    If there are none, ``fun`` is simply called.

    Args:
      fun: a function of trees; arrays that it closes over need :func:`to_current_mesh`.
      args: its arguments; leaves that are not arrays are passed on as they are.
      batch: the arguments that hold arrays ``[B,...]``. The first such array that is sharded along its first axis
        determines how results ``[B,...]`` are sharded; other results are replicated along the explicit axes.

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
    """The same arrays on the current mesh, if they are on its devices but with other axis types.

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
        return jax.sharding.reshard(x, PartitionSpec())  # automatic axes stay unconstrained, so nothing moves

    return jax.tree.map(move, tree)


def _mesh_to_compute_on(tree: Any) -> AbstractMesh | None:
    """The mesh to compute on; None if no explicit axes are involved."""
    current = jax.sharding.get_abstract_mesh()
    if current.explicit_axes:
        return current
    explicit = next((mesh for mesh in map(_mesh_of, jax.tree.leaves(tree)) if mesh.explicit_axes), None)
    return explicit if explicit is None or current.empty else current


def _mesh_of(x: Any) -> AbstractMesh:
    return jax.typeof(x).sharding.mesh if isinstance(x, jax.Array) else _NO_MESH


_NO_MESH = AbstractMesh((), ())


def _sharded_batch(tree: Any, mesh: AbstractMesh) -> tuple[int | None, Any]:
    """The batch size of the first array that is sharded along its first axis, and the explicit axes that shard it."""
    kinds = (jax.typeof(x) for x in jax.tree.leaves(tree) if _mesh_of(x) == mesh)
    sharded = ((kind.shape[0], kind.sharding.spec[0]) for kind in kinds if kind.ndim and kind.sharding.spec[0])
    return next(sharded, (None, None))


def logical_axes(path: str, shape: Sequence[int]) -> tuple[str | None, ...]:
    """The logical axes of the parameter at ``path``: one name, or None, for each of its dimensions."""
    named = (axes for pattern, axes in LOGICAL_AXES if re.search(pattern, path) and len(axes) == len(shape))
    return next(named, BY_RANK.get(len(shape), (None,) * len(shape)))


def param_spec(
    path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Mapping[str, str] = RULES
) -> PartitionSpec:
    """How to shard the parameter at ``path`` (joined with ``/``); axes that do not divide evenly are not sharded."""
    spec = [rules.get(name) if name else None for name in logical_axes(path, shape)]
    fits = lambda axis, size: axis in mesh.shape and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0
    return PartitionSpec(*(axis if fits(axis, size) else None for axis, size in zip(spec, shape, strict=True)))


def param_shardings(shapes: Any, mesh: Mesh, rules: Mapping[str, str] = RULES) -> Any:
    """The tree of ``NamedSharding`` for a tree of shapes (``Model.shapes()``) or of arrays.

    Explicit axes of the mesh stay explicit, so the parameters can be used together with other arrays on this mesh.
    The tree may hold parameters deeper inside, as a training state does: an optimiser's moments are sharded like the
    parameters that they belong to, and leaves without a parameter's path are replicated.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def put_params(tree: Tree, mesh: Mesh) -> Tree:
    """Parameters on the mesh, sharded by :func:`param_shardings`.

    If the mesh spans several processes, each must have the same arrays, or global arrays on the devices of all.
    """
    shardings = param_shardings(tree, automatic(mesh))
    if not spans_processes(mesh):
        return jax.device_put(tree, shardings)

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        if is_global(x):
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x)[index])

    return jax.tree.map(put, tree, shardings)


def gathered(path: Sequence[str], kernel: jax.Array) -> jax.Array:
    """All-gather a parameter that is sharded along ``fsdp``, where a layer uses it.

    Its gradient is sharded along ``fsdp`` again, so each device receives only its part of the sum. Left alone, the
    compiler might keep the parameter sharded and divide the layer's work by channels, which moves activations between
    devices and holds those of the whole batch. Does nothing unless the current mesh (``jax.set_mesh``, or that of
    :func:`diffuse_jax.training.state.make_step`) has an automatic axis ``fsdp``.

    Args:
      path: names from the root of the parameters to this one.
      kernel: the parameter, in the dtype to send between devices.
    """
    if "fsdp" not in automatic_axes():
        return kernel
    sharded = param_spec("/".join(path), kernel.shape, jax.sharding.get_abstract_mesh())
    full = PartitionSpec(*(None if axis == "fsdp" else axis for axis in sharded))
    return kernel if full == sharded else _gather(kernel, sharded, full)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, sharded: PartitionSpec, full: PartitionSpec) -> jax.Array:
    # Sharded first: otherwise the compiler might gather before a cast to a narrower dtype.
    return lax.with_sharding_constraint(lax.with_sharding_constraint(x, sharded), full)


def _gather_forward(x: jax.Array, sharded: PartitionSpec, full: PartitionSpec) -> tuple[jax.Array, None]:
    return _gather(x, sharded, full), None


def _gather_backward(sharded: PartitionSpec, full: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Full first: asked for one shard directly, the compiler may gather the batch to compute just that.
    return (lax.with_sharding_constraint(lax.with_sharding_constraint(gradient, full), sharded),)


_gather.defvjp(_gather_forward, _gather_backward)


def shard_batch(x: jax.Array) -> jax.Array:
    """``x [B,...]`` sharded by its first axis along ``data`` and ``fsdp`` of the current mesh, if they divide it."""
    mesh, axes = jax.sharding.get_abstract_mesh(), automatic_axes()
    over = tuple(axis for axis in ("data", "fsdp") if axis in axes)
    if not over or x.shape[0] % math.prod(mesh.shape[axis] for axis in over):
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return lax.with_sharding_constraint(x, PartitionSpec(over, *free))


def shard_rows(x: jax.Array, multiple: int = 1) -> jax.Array:
    """Images ``[B,H,W,C]`` with their rows sharded along ``sequence`` of the current mesh, or whole if it does not
    divide ``H / multiple`` evenly.

    Convolutions do this to their inputs (with their stride) and results, and the compiler divides the rest accordingly:
    devices exchange the rows at the seams, and norms the sums of their groups. Left alone, the compiler would divide
    small images unevenly; in a loop it then computed wrong values (jaxlib 0.10.2, stride 2 from one row per device).
    """
    if "sequence" not in automatic_axes():
        return x
    size, free = jax.sharding.get_abstract_mesh().shape["sequence"], PartitionSpec.UNCONSTRAINED
    axis = "sequence" if x.shape[1] % (size * multiple) == 0 else None
    return lax.with_sharding_constraint(x, PartitionSpec(free, axis, free, free))


def automatic_axes() -> set[str]:
    """Axes of the current mesh that have more than one device and are left to the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1}


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether the mesh has devices that this process does not own (a pod slice, several GPU machines)."""
    return mesh is not None and any(d.process_index != jax.process_index() for d in mesh.devices.flat)


def readable(tree: Any) -> Any:
    """The same arrays, readable by this process; if they span several processes, all of these must call this."""
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True) if is_global(x) else x, tree)


def is_global(x: Any) -> bool:
    """Whether an array has shards on devices of other processes."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def train_batch_sharding(mesh: Mesh) -> NamedSharding:
    """For training batches ``[accumulation steps, B, ...]``: the second axis is sharded along ``data`` and ``fsdp``."""
    return NamedSharding(automatic(mesh), PartitionSpec(None, tuple(a for a in ("data", "fsdp") if a in mesh.shape)))
