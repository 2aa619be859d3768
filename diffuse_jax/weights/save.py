"""Writing a tree of arrays to files that PyTorch diffusers and transformers open as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from diffuse_jax.weights import names as naming
from diffuse_jax.weights.copy import compact
from diffuse_jax.weights.files import write_json
from diffuse_jax.weights.safetensors import write_safetensors
from diffuse_jax.writing import expanded

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def save_params(
    folder: Path | str,
    params: Mapping[str, Any],
    *,
    stem: str = "diffusion_pytorch_model",
    variant: str | None = None,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = "10GB",
    names: naming.Renames = (),
) -> list[Path]:
    """Write a tree of arrays as safetensors with PyTorch's names and axes.

    Each file is complete before it gets its name, and an index is written after its shards, so an interrupted save
    leaves an earlier one usable. Files of an earlier save that the new one replaces are removed at the end.

    Args:
      folder: created if needed.
      params: the tree of parameters.
      stem: ``diffusion_pytorch_model``, or ``model`` for transformers' networks.
      variant: ``"fp16"`` writes ``{stem}.fp16.safetensors``. It affects only the name; ``dtype`` casts.
      dtype: cast floating-point tensors to this dtype; None leaves them unchanged.
      max_shard_size: in bytes, or a string such as ``"2GB"``; larger networks are split into several files with an
        index.
      names: as in :func:`diffuse_jax.weights.load_params`.

    Returns:
      The files written, the index last if there is one.
    """
    flat = naming.flatten(params)
    leaves = {key: (path, flat[path]) for key, path in naming.torch_keys(flat, names).items()}
    specs = {key: _spec(path, leaf, dtype) for key, (path, leaf) in sorted(leaves.items())}
    return save_tensors(folder, specs, lambda key: _host(*leaves[key], dtype), stem, variant, max_shard_size)


def _spec(path: naming.Path, leaf: Any, dtype: DTypeLike | None) -> tuple[np.dtype, tuple[int, ...]]:
    """Dtype and PyTorch shape of a leaf, without reading its values."""
    shape = naming.to_torch(path, np.broadcast_to(np.zeros((), bool), leaf.shape)).shape
    return _cast(leaf.dtype, dtype), shape


def _cast(have: Any, want: DTypeLike | None) -> np.dtype:
    return jnp.dtype(want) if want is not None and jnp.issubdtype(have, jnp.floating) else jnp.dtype(have)


def _host(path: naming.Path, leaf: Any, dtype: DTypeLike | None) -> np.ndarray:
    """One tensor with PyTorch's axis order, in host memory."""
    return compact(naming.to_torch(path, np.asarray(jax.device_get(leaf))), _cast(leaf.dtype, dtype))


def save_tensors(
    folder: Path | str,
    specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    read: Any,
    stem: str,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> list[Path]:
    """Write named tensors as one safetensors file, or as shards with an index.

    Args:
      folder: created if needed.
      specs: name -> (dtype, shape), in the order of writing.
      read: name -> array of that dtype and shape; called once per name, so only one array is in memory at a time.
      stem, variant, max_shard_size: as in :func:`save_params`.

    Returns:
      The files written, the index last if there is one.
    """
    folder = expanded(folder)
    dot = f".{variant}" if variant else ""
    groups = _split(specs, parse_size(max_shard_size))

    def arrays(group: list[str]) -> Iterator[np.ndarray]:
        return (read(key) for key in group)

    if len(groups) == 1:
        written = [folder / f"{stem}{dot}.safetensors"]
    else:
        written = [folder / f"{stem}{dot}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for path, group in zip(written, groups, strict=True):
        write_safetensors(path, {key: specs[key] for key in group}, arrays(group))
    if len(groups) > 1:
        total = sum(_bytes(spec) for spec in specs.values())
        weight_map = {key: path.name for path, group in zip(written, groups, strict=True) for key in group}
        written.append(folder / f"{stem}.safetensors.index{dot}.json")
        write_json(written[-1], {"metadata": {"total_size": total}, "weight_map": weight_map})
    _remove_replaced(folder, stem, dot, {path.name for path in written})
    return written


def _bytes(spec: tuple[np.dtype, tuple[int, ...]]) -> int:
    return spec[0].itemsize * int(np.prod(spec[1], dtype=np.int64))


def _split(specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most ``limit`` bytes; a larger tensor gets a group of its own."""
    groups: list[list[str]] = [[]]
    size = 0
    for key, spec in specs.items():
        if groups[-1] and size + _bytes(spec) > limit:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += _bytes(spec)
    return groups


def parse_size(size: int | str) -> int:
    """``"2GB"`` -> 2000000000; an int is a number of bytes.

    Raises:
      ValueError: it is not a size.
    """
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B)\s*", size, re.IGNORECASE)
    if not found:
        raise ValueError(
            f"max_shard_size must be a number of bytes or a string such as '2GB' or '512MiB', got {size!r}"
        )
    return int(float(found[1]) * UNITS[found[2].upper()])


def _remove_replaced(folder: Path, stem: str, dot: str, written: set[str]) -> None:
    """Remove the single file, shards and index of an earlier save of the same stem and variant."""
    index = f"{stem}.safetensors.index{dot}.json"
    weights = re.compile(rf"{re.escape(stem + dot)}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    for path in folder.iterdir():
        if path.name not in written and (path.name == index or weights.fullmatch(path.name)):
            path.unlink()
