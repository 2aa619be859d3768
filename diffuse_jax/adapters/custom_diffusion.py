"""Custom Diffusion (Kumari et al. 2023, arXiv 2212.04488): new projections of a UNet's cross-attention.

A file has whole kernels that replace those of the checkpoint: ``to_k`` and ``to_v`` of every cross-attention, or
``to_q`` and ``to_out`` as well. Its keys are those of attention processors in diffusers, such as
``mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight``; the other attentions have
a processor without parameters, which is an empty dict in diffusers' ``.bin`` files. Here new leaves are a tree of
arrays in Flax's layout, at the paths of those that they replace.
"""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.adapters.targets import CUSTOM_DIFFUSION
from diffuse_jax.errors import WeightsError, bad
from diffuse_jax.layouts.kinds import held
from diffuse_jax.limits import absence, refuse_links
from diffuse_jax.messages import brief
from diffuse_jax.models.base import Params
from diffuse_jax.weights.copy import refuse_not_finite
from diffuse_jax.weights.load import read_checkpoint
from diffuse_jax.weights.names import Path as LeafPath
from diffuse_jax.weights.names import flatten, from_torch, to_torch, torch_key, unflatten
from diffuse_jax.weights.safetensors import write_safetensors
from diffuse_jax.weights.torch_writer import write_torch
from diffuse_jax.writing import expanded

FILE = "pytorch_custom_diffusion_weights.safetensors"
OLD_FILE = "pytorch_custom_diffusion_weights.bin"


def leaves_of(params: Params, which: str) -> Params:
    """The leaves of a UNet that Custom Diffusion replaces, as a tree; ``which`` is a key of
    :data:`~diffuse_jax.adapters.targets.CUSTOM_DIFFUSION`.

    Raises:
      ValueError: the network has no cross-attention.
    """
    pattern = CUSTOM_DIFFUSION[which]
    found = {path: leaf for path, leaf in flatten(params).items() if re.search(pattern, "/" + "/".join(path))}
    if not found:
        raise ValueError("Custom Diffusion changes the cross-attention of a UNet, and this network has none")
    return unflatten(found)


def merged(params: Params, leaves: Params) -> Params:
    """A network's parameters with new leaves, cast to the dtypes of those that they replace."""
    old, new = flatten(params), flatten(leaves)
    return unflatten(old | {path: jnp.asarray(leaf).astype(old[path].dtype) for path, leaf in new.items()})


def key_of(path: LeafPath) -> str:
    """The key of a leaf in files: ``...attn2/to_k/kernel`` is ``...attn2.processor.to_k_custom_diffusion.weight``."""
    return re.sub(r"\.(to_q|to_k|to_v|to_out)\.((\d+\.)?\w+)$", r".processor.\1_custom_diffusion.\2", torch_key(path))


def unchanged(leaves: Params, shapes: Params) -> list[str]:
    """The names of the attention processors of a UNet of which no leaf is new."""
    attentions = {path[:-2] for path in flatten(shapes) if path[-2:] == ("to_q", "kernel")}
    changed = {path[:-2] for path in flatten(leaves)}
    return [torch_key((*path, "processor", "")).removesuffix(".") for path in sorted(attentions - changed)]


def read_leaves(source: str | Path, shapes: Params, weight_name: str | None = None) -> Params:
    """Read the leaves of a file for a UNet of these shapes, as a tree.

    Args:
      source: the file (``.safetensors`` or ``.bin``), or its folder.
      shapes: the UNet's parameters or their shapes.
      weight_name: the file in the folder; by default one of :data:`FILE` and :data:`OLD_FILE`.

    Raises:
      WeightsError: the file does not exist, holds something else, or does not fit the UNet. Nothing is loaded in part.
    """
    file = file_of(expanded(source), weight_name)
    tensors = {key: tensor for key, tensor in read_checkpoint([file]).tensors.items() if tensor.size}
    if not any("custom_diffusion" in key for key in tensors):
        raise bad(file, f"holds no weights of Custom Diffusion.{held(tensors)}")
    flat = flatten(shapes)
    paths = {key_of(path): path for path in flat if any(word in path for word in ("attn1", "attn2"))}
    if unknown := [key for key in tensors if key not in paths]:
        raise bad(file, f"{brief(unknown[0])} is for a layer that this UNet does not have; it was made for another one")
    leaves: dict[LeafPath, np.ndarray] = {}
    for key, tensor in tensors.items():
        path, leaf = paths[key], from_torch(paths[key], tensor)
        if leaf.shape != flat[path].shape:
            want = to_torch(path, np.broadcast_to(np.zeros((), bool), flat[path].shape)).shape
            raise bad(
                file,
                f"{key} is {list(tensor.shape)}, but this UNet has {list(want)} there; it was made for another one",
            )
        refuse_not_finite(file, key, tensor)
        leaves[path] = leaf
    return unflatten(leaves)


def file_of(source: Path, weight_name: str | None = None) -> Path:
    """The file of a path, which may be the file itself or its folder.

    Raises:
      WeightsError: there is none.
    """
    file = source
    if source.is_dir():
        names = (FILE, OLD_FILE) if weight_name is None else (weight_name,)
        file = next((path for name in names if (path := refuse_links(source) / name).is_file()), source / names[0])
    if not file.is_file():
        raise WeightsError(f"{file}: {absence(file)}; expected {FILE} or {OLD_FILE}, or the folder of one")
    return file


def save_leaves(file: str | Path, leaves: Params, shapes: Params) -> Path:
    """Write leaves as a file that ``load_attn_procs`` here and in PyTorch diffusers opens.

    Unchanged attentions are tensors without elements in it, which diffusers reads as their processors. Those that it
    leaves out of its own ``.safetensors`` files keep it from opening them again.

    Args:
      file: the file, ``.safetensors`` or ``.bin``; its folder is created if needed.
      leaves: the new leaves, as a tree.
      shapes: the UNet's parameters or their shapes.
    """
    path = expanded(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key_of(way): to_torch(way, np.asarray(jax.device_get(leaf))) for way, leaf in flatten(leaves).items()}
    tensors |= dict.fromkeys(unchanged(leaves, shapes), np.zeros(0, np.float32))
    write = write_torch if path.suffix == ".bin" else write_safetensors
    write(path, {key: (x.dtype, x.shape) for key, x in tensors.items()}, iter(tensors.values()))
    return path
