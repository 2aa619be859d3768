"""Loading files into a tree of arrays: match all names and shapes first, then read tensor by tensor to the devices."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from diffuse_jax.errors import WeightsError, bad
from diffuse_jax.weights import names as naming
from diffuse_jax.weights.copy import compact, forget
from diffuse_jax.weights.files import weight_files
from diffuse_jax.weights.msgpack import read_msgpack
from diffuse_jax.weights.safetensors import read_safetensors
from diffuse_jax.weights.torch_file import read_torch

READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": read_safetensors,
    ".bin": read_torch,
    ".pt": read_torch,
    ".pth": read_torch,
    ".ckpt": read_torch,
    ".msgpack": read_msgpack,
}
WORKERS = min(4, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors under their names in the files; each is a view of its file that is read when it is used.

    Attributes:
      tensors: name -> array. In a Flax file, names are paths joined with ``/`` and axes are in Flax order.
      files: name -> the file that contains it.
      flax: whether names and axis order are those of Flax.
    """

    tensors: dict[str, np.ndarray]
    files: dict[str, Path]
    flax: bool = False


def read_checkpoint(files: Iterable[Path]) -> Checkpoint:
    """Open files (the shards of one network, or one file) without reading their tensors.

    Raises:
      WeightsError: a file has an unknown suffix or is damaged or hostile, or two files contain the same name.
    """
    tensors: dict[str, np.ndarray] = {}
    origin: dict[str, Path] = {}
    flax = False
    for file in files:
        if (kind := file.suffix.lower()) not in READERS:
            raise bad(file, f"unknown file type {file.suffix!r}; expected one of {', '.join(READERS)}")
        flax = kind == ".msgpack"
        for name, array in READERS[kind](file).items():
            if name in tensors:
                raise bad(file, f"{name!r} is also in {origin[name].name}")
            tensors[name], origin[name] = array, file
    return Checkpoint(tensors, origin, flax)


def load_params(
    folder: Path | str,
    shapes: Mapping[str, Any],
    *,
    stem: str = "diffusion_pytorch_model",
    variant: str | None = None,
    dtype: DTypeLike | None = None,
    shardings: Any = None,
    names: naming.Renames = (),
) -> dict[str, Any]:
    """Load the weights in a component's folder as a tree of arrays.

    Args:
      folder: a local folder with ``{stem}.safetensors`` (or shards, ``.bin``, ``.msgpack``).
      shapes: the network's tree of shapes (``Model.shapes()``); every leaf needs exactly one tensor of its shape.
      stem: ``diffusion_pytorch_model``, or ``model`` for transformers' networks.
      variant: for example ``"fp16"``; only files of that variant are used.
      dtype: cast floating-point tensors to this dtype as they are read; None leaves them unchanged.
      shardings: a ``jax.sharding.Sharding`` for all leaves or a tree of them; each device then reads only its shard.
      names: renames from the tree's PyTorch names to the file's, for names that do not follow the rule.

    Returns:
      The tree of ``jax.Array``.

    Raises:
      WeightsError: a file is damaged or hostile, or a tensor is missing, unexpected, duplicated or misshapen. Nothing
        is put on a device before all names and shapes have been checked.
    """
    folder = Path(folder)
    checkpoint = read_checkpoint(weight_files(folder, stem, variant))
    return place(match(checkpoint, shapes, label=str(folder), names=names), dtype=dtype, shardings=shardings)


def match(
    checkpoint: Checkpoint, shapes: Mapping[str, Any], *, label: str, names: naming.Renames = ()
) -> dict[naming.Path, np.ndarray]:
    """Pair every leaf of the tree with its tensor, as a view with the leaf's axis order.

    Args:
      checkpoint: the tensors of the files.
      shapes: the network's tree of shapes.
      label: what error messages call the checkpoint, for example its folder.
      names: as in :func:`load_params`.

    Raises:
      WeightsError: names and shapes do not match one to one; the message has counts and examples of both sides.
    """
    tree = naming.flatten(shapes)
    wanted = {"/".join(path): path for path in tree} if checkpoint.flax else naming.torch_keys(tree, names)
    found = _by_wanted_name(checkpoint, wanted)
    _check_names(label, wanted, found)
    views = {}
    for key, path in wanted.items():
        array = checkpoint.tensors[found[key]]
        view = array if checkpoint.flax else naming.from_torch(path, array)
        if view.shape != tree[path].shape:
            raise bad(
                checkpoint.files[found[key]],
                f"{found[key]!r} has shape {list(array.shape)}, which gives {list(view.shape)}; "
                f"{'/'.join(path)} needs {list(tree[path].shape)}. Does the config belong to another model?",
            )
        views[path] = view
    return views


def _by_wanted_name(checkpoint: Checkpoint, wanted: Mapping[str, Any]) -> dict[str, str]:
    """Name in the tree (or an unknown name unchanged) -> name in the file; buffers, and second names beside
    the first, are dropped."""
    tables = (naming.FLAX_ALIASES,) if checkpoint.flax else (naming.ALIASES, naming.VISION_ALIASES)
    found: dict[str, str] = {}
    for name in checkpoint.tensors:
        target = naming.known_name(name, wanted, tables)
        is_second_name = target != name and target in checkpoint.tensors
        if (is_second_name or target not in wanted) and naming.IGNORED.search(name):
            continue
        if target in found:
            raise bad(checkpoint.files[name], f"{name!r} and {found[target]!r} are the same parameter")
        found[target] = name
    return found


def _check_names(label: str, wanted: Mapping[str, naming.Path], found: Mapping[str, str]) -> None:
    """Raise if tensors are missing or unexpected, with counts and examples."""
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted]
    if not missing and not unexpected:
        return
    examples = [f"{key!r} for {'/'.join(wanted[key])}" for key in missing[:3]]
    examples += [f"{key!r} matches nothing" for key in unexpected[:3]]
    raise WeightsError(f"{label}: {len(missing)} missing, {len(unexpected)} unexpected, e.g. {'; '.join(examples)}")


def check_params(params: Mapping[str, Any], shapes: Mapping[str, Any], *, label: str) -> None:
    """Check that a tree of arrays has the names and shapes of a network.

    Args:
      params: the tree of arrays.
      shapes: the network's tree of shapes.
      label: what the error message begins with.

    Raises:
      WeightsError: it does not; the message has counts and examples.
    """
    have, want = naming.flatten(params), naming.flatten(shapes)
    keys = {"/".join(path): path for path in want}
    _check_names(label, keys, {name: name for name in map("/".join, have)})
    for path, leaf in have.items():
        if leaf.shape != want[path].shape:
            raise WeightsError(
                f"{label}: {'/'.join(path)} has shape {list(leaf.shape)}, expected {list(want[path].shape)}"
            )


def place(
    views: Mapping[naming.Path, np.ndarray], *, dtype: DTypeLike | None = None, shardings: Any = None
) -> dict[str, Any]:
    """Copy views of files to devices, a few at a time, to use little host memory.

    Args:
      views: path -> array with the leaf's axis order.
      dtype, shardings: as in :func:`load_params`.
    """
    where = _sharding_of(views, shardings)

    def put(path: naming.Path) -> jax.Array:
        view, sharding = views[path], where[path]
        to = jnp.dtype(dtype) if dtype is not None and jnp.issubdtype(view.dtype, jnp.floating) else view.dtype
        if sharding is None:
            array = jax.device_put(compact(view, to))
        else:
            array = jax.make_array_from_callback(view.shape, sharding, lambda index: compact(view[index], to))
        forget(view)
        return array

    # Large tensors first, so that the last worker is not left with one of them.
    order = sorted(views, key=lambda path: -views[path].size)
    with ThreadPoolExecutor(WORKERS) as pool:
        arrays = dict(zip(order, pool.map(put, order), strict=True))
    return naming.unflatten({path: arrays[path] for path in views})


def _sharding_of(views: Mapping[naming.Path, Any], shardings: Any) -> dict[naming.Path, Any]:
    """Path -> sharding, from a single sharding or a tree of them."""
    if not isinstance(shardings, Mapping):
        return dict.fromkeys(views, shardings)
    flat = naming.flatten(shardings)
    if flat.keys() != views.keys():
        odd = sorted("/".join(path) for path in flat.keys() ^ views.keys())
        raise ValueError(f"the tree of shardings differs from the tree of parameters, e.g. at {odd[0]}")
    return flat
