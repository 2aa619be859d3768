"""``pytorch_lora_weights.safetensors``: low-rank pairs as PyTorch diffusers writes and reads them.

A key is the network's name in the pipeline, the layer's PyTorch name, and which half of the pair it is:
``unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight``. Several spellings are read; one
is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffuse_jax.adapters.lora import PAIR, dense_layers, pairs_of
from diffuse_jax.models.base import Params
from diffuse_jax.weights.errors import WeightsError, bad
from diffuse_jax.weights.names import torch_key, unflatten
from diffuse_jax.weights.safetensors import read_safetensors, write_safetensors

FILE = "pytorch_lora_weights.safetensors"

SPELLINGS = {
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".alpha": "alpha",
}
"""Ends of keys -> what the tensor is. An ``alpha`` is a number that stands for a factor ``alpha / r``."""


def save_lora(folder: str | Path, pairs: Mapping[str, Params]) -> Path:
    """Write the pairs of a pipeline's networks, ``{"unet": ..., "text_encoder": ...}``, as PyTorch reads them."""
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
    """Read pairs for networks of these shapes, ``{"unet": model.shapes(), ...}``; any ``alpha`` is worked into ``up``.

    Args:
      source: the file, or the folder that holds :data:`FILE`.
      shapes: the networks of the pipeline that may have pairs.

    Raises:
      WeightsError: no such file, a key of no known form, a layer that a network does not have, half a pair, or a shape
        that does not fit. Nothing is half-loaded.
    """
    file = Path(source) / FILE if Path(source).is_dir() else Path(source)
    if not file.is_file():
        raise WeightsError(f"{file}: no such file; LoRA weights are a .safetensors file or a folder with {FILE}")
    layers = {
        f"{network}.{torch_key((*path, 'kernel')).removesuffix('.weight')}": (network, path)
        for network, tree in shapes.items()
        for path in dense_layers(tree)
    }
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in read_safetensors(file).items():
        stem, kind = _split(file, key)
        if stem not in layers:
            raise bad(file, f"{key!r} belongs to no dense layer of {', '.join(shapes)}: LoRA of another network?")
        found.setdefault(stem, {})[kind] = tensor
    flat: dict[tuple[str, ...], Any] = {}
    for stem, parts in found.items():
        network, path = layers[stem]
        for half, array in _pair(file, stem, parts, dense_layers(shapes[network])[path]).items():
            flat[(network, *path, half)] = array
    return unflatten(flat)


def _split(file: Path, key: str) -> tuple[str, str]:
    """``unet.a.b.lora.down.weight`` -> ``("unet.a.b", "down")``; some files say ``unet.`` twice."""
    for end, kind in SPELLINGS.items():
        if key.endswith(end):
            stem = re.sub(r"^(unet\.)+", "unet.", key.removesuffix(end))
            stem = re.sub(r"\.processor\.(to_\w+)_lora$", r".\1", stem).replace(".to_out_lora", ".to_out.0")
            return re.sub(r"\.to_out$", ".to_out.0", stem), kind
    raise bad(file, f"{key!r} is no LoRA tensor; expected names that end in {', '.join(SPELLINGS)}")


def _pair(file: Path, stem: str, parts: dict[str, np.ndarray], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Checked ``down [in, r]`` and ``up [r, out]``, float32."""
    missing = [half for half in PAIR if half not in parts]
    if missing:
        raise bad(file, f"{stem} has no {missing[0]} half")
    down, up = (np.asarray(parts[half], np.float32) for half in PAIR)
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or (down.shape[1], up.shape[0]) != shape:
        raise bad(file, f"{stem}: down {down.shape} and up {up.shape} do not fit a layer from {shape[0]} to {shape[1]}")
    factor = float(parts["alpha"]) / down.shape[0] if "alpha" in parts else 1.0
    return {"down": down.T, "up": factor * up.T}
