"""Where the arrays of a run lie: on the pipeline's mesh, else where JAX's own rules put them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffuse_jax.pipelines.method import Params, Rows
from diffuse_jax.schedulers.plan import Plan
from diffuse_jax.sharding import put_params

ROWS, WHOLE = PartitionSpec("data"), PartitionSpec()


def moved(params: Mapping[str, Params], mesh: Mesh | None) -> dict[str, Params]:
    """Parameters where a pipeline on this mesh keeps them; without a mesh, where they lie.

    What lies in host memory (offloaded) stays there, and a tree that is on the mesh's devices already stays as it is,
    however it is cut.
    """
    if mesh is None:
        return dict(params)
    devices = {*mesh.devices.flat}
    there = lambda x: not _on_devices(x) or x.sharding.device_set == devices

    def move(tree: Any) -> Any:
        if all(map(there, jax.tree.leaves(tree))):
            return tree
        return jax.tree.map(lambda x, put: put if isinstance(x, jax.Array) else x, tree, put_params(tree, mesh))

    return {name: move(tree) for name, tree in params.items()}


def taken_off(params: Mapping[str, Params]) -> dict[str, Params]:
    """Parameters of a mesh on JAX's default device."""
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x)) if _on_devices(x) else x, dict(params))


def _on_devices(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)


def placed_params(pipe: Any, names: Sequence[str]) -> Params:
    """The parameters of the named components, on the devices.

    Raises:
      ValueError: the pipeline has no parameters of one of them.
    """
    if missing := [name for name in names if name not in pipe.params]:
        raise ValueError(f"the pipeline has no parameters of {', '.join(missing)}; it has {', '.join(pipe.params)}")
    return {name: on_device(pipe.mesh, pipe.params[name]) for name in names}


def on_device(mesh: Mesh | None, params: Any) -> Any:
    """Parameters that lie on the host as device arrays; others as they are."""
    leaves = jax.tree.leaves(params)
    if not leaves or not isinstance(leaves[0], np.ndarray):
        return params
    return jax.device_put(params) if mesh is None else put_params(params, mesh)


def place(mesh: Mesh | None, rows: Rows) -> Rows:
    """Rows over the mesh's ``data`` axis; without a mesh, onto the default device."""
    return jax.device_put(rows) if mesh is None else jax.device_put(rows, NamedSharding(mesh, ROWS))


def place_whole(mesh: Mesh | None, plan: Plan) -> Plan:
    """A plan on every device of the mesh; without a mesh, on the default device."""
    return jax.device_put(plan) if mesh is None else jax.device_put(plan, NamedSharding(mesh, WHOLE))
