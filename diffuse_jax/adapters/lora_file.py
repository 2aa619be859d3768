"""``pytorch_lora_weights.safetensors``: LoRA in the format of PyTorch diffusers.

Several naming schemes are read (:mod:`diffuse_jax.layouts.lora`); one is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffuse_jax.adapters.lora import PAIR, dense_layers, pairs_of
from diffuse_jax.errors import WeightsError, bad
from diffuse_jax.layouts.lora import pair_factor, read_settings, split_key
from diffuse_jax.limits import refuse_links
from diffuse_jax.models.base import Params
from diffuse_jax.weights.copy import compact
from diffuse_jax.weights.load import read_checkpoint
from diffuse_jax.weights.names import flatten, torch_key, unflatten
from diffuse_jax.weights.safetensors import write_safetensors

FILE = "pytorch_lora_weights.safetensors"
OLD_FILE = "pytorch_lora_weights.bin"


def save_lora(folder: str | Path, pairs: Mapping[str, Params]) -> Path:
    """Write the pairs of a pipeline's networks, ``{"unet": ..., "text_encoder": ...}``, in the PyTorch format."""
    tensors: dict[str, np.ndarray] = {}
    for network, tree in pairs.items():
        kind = "lora" if network == "unet" else "lora_linear_layer"
        for path, pair in pairs_of(tree).items():
            stem = f"{network}.{torch_key((*path, 'kernel')).removesuffix('.weight')}.{kind}"
            for half in PAIR:
                tensors[f"{stem}.{half}.weight"] = np.asarray(jax.device_get(pair[half])).T
    file = Path(folder) / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    ordered = dict(sorted(tensors.items()))
    write_safetensors(file, {k: (v.dtype, v.shape) for k, v in ordered.items()}, iter(ordered.values()))
    return file


def load_lora(source: str | Path, shapes: Mapping[str, Params]) -> dict[str, Params]:
    """Read pairs for networks of these shapes, ``{"unet": model.shapes(), ...}``; ``alpha`` is folded into ``up``.

    Args:
      source: the file (``.safetensors`` or ``.bin``), or the folder that holds :data:`FILE` or :data:`OLD_FILE`.
      shapes: the networks of the pipeline that may have LoRA.

    Raises:
      WeightsError: the file does not exist, or has an unknown kind of key, a layer that the network lacks, half a
        pair, a wrong shape, or settings that match nothing in it. Nothing is loaded in part.
    """
    file = _file(Path(source))
    layers = {
        f"{network}.{torch_key((*path, 'kernel')).removesuffix('.weight')}": (network, path)
        for network, tree in shapes.items()
        for path in dense_layers(tree)
    }
    found: dict[str, dict[str, np.ndarray]] = {}
    names_in_file: dict[str, str] = {}
    for key, tensor in read_checkpoint([file]).tensors.items():
        stem, kind, name_in_file = split_key(file, key)
        if stem not in layers:
            raise bad(file, f"{key!r} does not match a dense layer of {', '.join(shapes)}: {_why(stem, shapes)}")
        if kind in found.setdefault(stem, {}):
            raise bad(file, f"{key!r} and another key are the same tensor, {kind} of {stem}")
        found[stem][kind] = tensor
        names_in_file[stem] = name_in_file
    settings = read_settings(file, names_in_file)
    flat: dict[tuple[str, ...], Any] = {}
    for stem, parts in found.items():
        network, path = layers[stem]
        pair = _pair(file, stem, parts, dense_layers(shapes[network])[path])
        pair["up"] = pair_factor(file, stem, names_in_file[stem], parts, settings) * pair["up"]
        flat |= {(network, *path, half): array for half, array in pair.items()}
    return unflatten(flat)


def _file(source: Path) -> Path:
    """The LoRA file of a path, which may be the file itself or its folder."""
    inside = [source / name for name in (FILE, OLD_FILE) if (source / name).is_file()]
    if inside:
        refuse_links(source)
    file = source if not source.is_dir() else inside[0] if inside else source / FILE
    if not file.is_file():
        raise WeightsError(f"{file}: no such file; expected a .safetensors or .bin file, or a folder with {FILE}")
    return file


def _why(stem: str, shapes: Mapping[str, Params]) -> str:
    """Why a layer has no match, for the error."""
    network, _, layer = stem.partition(".")
    kernels = {torch_key(path) for path in flatten(shapes.get(network, {})) if path[-1] == "kernel"}
    return "it is a convolution" if f"{layer}.weight" in kernels else "is the LoRA for another network?"


def _pair(file: Path, stem: str, parts: dict[str, np.ndarray], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """``down [in, r]`` and ``up [r, out]`` in float32, checked against the layer's shape."""
    missing = [half for half in PAIR if half not in parts]
    if missing:
        raise bad(file, f"{stem} has no {missing[0]} half")
    down, up = (parts[half] for half in PAIR)
    if down.ndim != 2 or up.ndim != 2 or not 0 < down.shape[0] == up.shape[1] or (down.shape[1], up.shape[0]) != shape:
        raise bad(file, f"{stem}: down {down.shape} and up {up.shape} do not fit a layer {shape[0]} -> {shape[1]}")
    wide = np.dtype(np.float32)
    return {"down": compact(down, wide).T, "up": compact(up, wide).T}
