"""Placement of arrays: on the pipeline's mesh if it has one, else by JAX's default rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffuse_jax.pipelines.method import Params, Rows
from diffuse_jax.schedulers.plan import Plan
from diffuse_jax.sharding import put_params

ROWS, REPLICATED = PartitionSpec("data"), PartitionSpec()


def params_to_mesh(params: Mapping[str, Params], mesh: Mesh | None) -> dict[str, Params]:
    """Parameters placed for a pipeline on this mesh; unchanged if there is no mesh.

    Parameters in host memory (offloaded) stay there, and a tree that is already on the mesh's devices keeps its
    sharding.
    """
    if mesh is None:
        return dict(params)
    devices = {*mesh.devices.flat}
    in_place = lambda x: not _on_devices(x) or x.sharding.device_set == devices

    def move(tree: Any) -> Any:
        if all(map(in_place, jax.tree.leaves(tree))):
            return tree
        return jax.tree.map(lambda x, put: put if isinstance(x, jax.Array) else x, tree, put_params(tree, mesh))

    return {name: move(tree) for name, tree in params.items()}


def params_to_default_device(params: Mapping[str, Params]) -> dict[str, Params]:
    """Parameters moved from a mesh to JAX's default device."""
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x)) if _on_devices(x) else x, dict(params))


def _on_devices(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)


def params_on_devices(pipe: Any, names: Sequence[str]) -> Params:
    """The parameters of the named components, on the devices.

    Raises:
      ValueError: the pipeline has no parameters for one of them.
    """
    if missing := [name for name in names if name not in pipe.params]:
        raise ValueError(f"the pipeline has no parameters for {', '.join(missing)}; it has {', '.join(pipe.params)}")
    return {name: on_device(pipe.mesh, pipe.params[name]) for name in names}


def on_device(mesh: Mesh | None, params: Any) -> Any:
    """Parameters in host memory, moved to the devices; device arrays are returned unchanged."""
    leaves = jax.tree.leaves(params)
    if not leaves or not isinstance(leaves[0], np.ndarray):
        return params
    return jax.device_put(params) if mesh is None else put_params(params, mesh)


def place_rows(mesh: Mesh | None, rows: Rows) -> Rows:
    """Rows sharded over the mesh's ``data`` axis; without a mesh, on the default device."""
    if mesh is not None:
        return jax.device_put(rows, NamedSharding(mesh, ROWS))
    return jax.device_put(jax.tree.map(lambda x: np.asarray(x) if _is_elsewhere(x) else x, rows))


def _is_elsewhere(x: Any) -> bool:
    """Whether an array is on another device than the default one, so that a program could not take it."""
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if default is None or isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    keys = isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return isinstance(x, jax.Array) and not keys and x.devices() != {default}


def place_plan(mesh: Mesh | None, plan: Plan) -> Plan:
    """A plan replicated on every device of the mesh; without a mesh, on the default device."""
    return jax.device_put(plan) if mesh is None else jax.device_put(plan, NamedSharding(mesh, REPLICATED))
