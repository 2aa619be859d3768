"""Writing a pipeline's networks to a single file in the original layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.layouts.families import FAMILIES
from diffuse_jax.layouts.markers import markers_for
from diffuse_jax.layouts.original import TABLES
from diffuse_jax.layouts.record import Configs, make_record
from diffuse_jax.layouts.rows import Table, combine, combined_shape, to_original
from diffuse_jax.weights.copy import check_whole, compact
from diffuse_jax.weights.safetensors import write_safetensors
from diffuse_jax.writing import expanded

Sources = dict[str, list[tuple[np.ndarray, str]]]
"""Name in the file -> the tensors that make it up, each with its operation (:mod:`diffuse_jax.layouts.rows`)."""


def write_single_file(
    path: Path | str,
    networks: Mapping[str, Mapping[str, np.ndarray]],
    family: str,
    cast: Any = lambda array: array.dtype,
    *,
    configs: Configs | None = None,
    schedulers: Configs | None = None,
) -> None:
    """Write a pipeline's networks to one ``.safetensors`` file in the original layout.

    Args:
      path: the file to write.
      networks: component name -> tensors under diffusers' names.
      family: as returned by :func:`diffuse_jax.layouts.family_for`.
      cast: array -> the dtype to write it in.
      configs: component name -> ``config.json``, stored in the file's metadata for what tensors do not imply.
      schedulers: component name -> ``scheduler_config.json``, stored there too.

    Raises:
      WeightsError: the layout has no name for one of the tensors.
    """
    sources: Sources = {}
    for part, tensors in networks.items():
        prefix, table = FAMILIES[family].places[part]
        sources |= original_names(tensors, TABLES[table](tensors), prefix)
    markers = markers_for(FAMILIES[family], configs, schedulers)
    sources |= {name: [(array, "same")] for name, array in markers.items()}
    exact = {id(array) for array in markers.values()}
    write_tensors(
        path,
        sources,
        lambda array: array.dtype if id(array) in exact else cast(array),
        make_record(configs, schedulers),
    )


def original_names(tensors: Mapping[str, np.ndarray], table: Table, prefix: str) -> Sources:
    """Name in the original layout, after a prefix -> the tensors that make it up.

    Raises:
      WeightsError: the layout has no name for one of the tensors.
    """
    groups = to_original(tensors, table).items()
    return {prefix + key: [(tensors[name], operation) for name, operation in members] for key, members in groups}


def write_tensors(path: Path | str, sources: Sources, cast: Any, metadata: dict[str, str] | None) -> None:
    """Write tensors of the original layout; each is made up and cast as it is written."""
    specs = {key: (np.dtype(cast(parts[0][0])), combined_shape(parts)) for key, parts in sorted(sources.items())}
    arrays = (_read(sources[key], dtype) for key, (dtype, _) in specs.items())
    write_safetensors(expanded(path), specs, arrays, metadata)


def _read(parts: list[tuple[np.ndarray, str]], dtype: np.dtype) -> np.ndarray:
    """The tensor that the parts combine to, in memory."""
    for array, _ in parts:
        check_whole(array)
    return compact(combine(parts), dtype)
