"""Where the parameters of a model go on a mesh, as a table: ``diffuse-jax env --mesh fsdp=8 --model SOURCE``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike

from diffuse_jax.columns import in_columns
from diffuse_jax.pipelines.configured import configured_networks
from diffuse_jax.sharding import abstract_mesh, logical_axes, param_spec
from diffuse_jax.weights.names import flatten


class Placed(NamedTuple):
    """One row of the table.

    Attributes:
      path: the component and the parameter's path in it, joined with ``/``.
      shape: the shape of the whole parameter.
      axes: its logical axes.
      cut: how it is sharded.
      total: bytes of the whole parameter.
      on_device: bytes on each device.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    cut: PartitionSpec
    total: int
    on_device: int


def placement_of(
    name: str, shapes: Mapping[str, Any], mesh: Mesh | AbstractMesh, dtype: DTypeLike = jnp.float32
) -> list[Placed]:
    """The rows of a network's parameters, from their shapes; floating-point parameters are counted as ``dtype``."""

    def row(path: tuple[str, ...], leaf: Any) -> Placed:
        inside = "/".join(path)
        cut = param_spec(inside, leaf.shape, mesh)
        kind = jnp.dtype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        total = math.prod(leaf.shape) * kind.itemsize
        parts = math.prod(mesh.shape[axis] for axis in cut if axis is not None)
        return Placed(f"{name}/{inside}", leaf.shape, logical_axes(inside, leaf.shape), cut, total, total // parts)

    return [row(path, leaf) for path, leaf in flatten(shapes).items()]


def component_shapes(source: str | Path, revision: str | None = None) -> dict[str, Any]:
    """The shapes of the parameters of each network of a pipeline, by component; no weights are read.

    Arguments and errors are those of :func:`~diffuse_jax.pipelines.configured.configured_networks`.
    """
    found: dict[str, Any] = {}
    for name, network in configured_networks(source, revision=revision).items():
        members = network if isinstance(network, list) else [network]
        names = [name] if len(members) == 1 else [f"{name}[{k}]" for k in range(len(members))]
        found |= {n: model.shapes() for n, model in zip(names, members, strict=True)}
    return found


def print_placement(
    source: str | Path, text: str, *, dtype: DTypeLike = jnp.float32, revision: str | None = None
) -> None:
    """Print the table of a model on the mesh that ``text`` describes, and the totals of each component.

    Raises:
      ValueError: as for :func:`diffuse_jax.sharding.parse_mesh`.
      WeightsError: as for :func:`component_shapes`.
    """
    mesh = abstract_mesh(text)
    components = component_shapes(source, revision)
    rows = {name: placement_of(name, shapes, mesh, dtype) for name, shapes in components.items()}
    every = [row for part in rows.values() for row in part]
    shape = lambda row: "x".join(map(str, row.shape)) or "scalar"
    print()
    show(
        ("parameter", "shape", "logical axes", "cut along", "bytes per device"),
        [(r.path, shape(r), _axes(r.axes), _axes(r.cut), f"{r.on_device:,}") for r in every],
    )
    print()
    parts = {**rows, "total": every}
    show(
        ("component", "parameters", "bytes", "bytes per device"),
        [
            (
                name,
                f"{sum(math.prod(r.shape) for r in part):,}",
                f"{sum(r.total for r in part):,}",
                f"{sum(r.on_device for r in part):,}",
            )
            for name, part in parts.items()
        ],
    )
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    print(f"\n{source} in {jnp.dtype(dtype).name} on {mesh.size} devices ({axes}); here are {jax.device_count()}")


def _axes(axes: Any) -> str:
    """The axes of a parameter's dimensions, ``-`` for none."""
    return ",".join(axis or "-" for axis in axes) if any(axes) else "-"


def show(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print rows in columns; those whose heading speaks of bytes or parameters are numbers, aligned on the right."""
    numbers = [title.startswith("bytes") or title == "parameters" for title in head]
    print(in_columns((head, *rows), numbers))
