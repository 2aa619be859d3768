"""``pytorch_lora_weights.safetensors``: low-rank pairs as PyTorch diffusers writes and reads them.

A key is the network's name in the pipeline, the layer's PyTorch name, and which half of the pair it is:
``unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight``. Several spellings are read; one
is written. A pair acts with the factor ``alpha / r``; ``alpha`` is a tensor of the layer, or stands for a whole network
in the settings of PEFT that newer files keep in their metadata, and is ``r`` where nothing says otherwise.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffuse_jax.adapters.lora import PAIR, dense_layers, pairs_of
from diffuse_jax.models.base import Params
from diffuse_jax.weights.errors import WeightsError, bad
from diffuse_jax.weights.load import read_checkpoint
from diffuse_jax.weights.names import ALIASES, Renames, flatten, rename, torch_key, unflatten
from diffuse_jax.weights.safetensors import read_metadata, write_safetensors

FILE = "pytorch_lora_weights.safetensors"
OLD_FILE = "pytorch_lora_weights.bin"

SPELLINGS = {
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
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
"""Ends of keys -> what the tensor is."""

STEMS: Renames = (
    (r"^(unet\.)+", "unet."),
    (r"^(?!unet\.|text_encoder)", "unet."),
    (r"\.processor\.", "."),
    (r"(attn\d\.to_out)$", r"\1.0"),
    (r"(self_attn)\.to_([qkv])$", r"\1.\2_proj"),
    (r"(self_attn)\.to_out$", r"\1.out_proj"),
)
"""Layers as older files name them -> as checkpoints do."""

SETTINGS = "lora_adapter_metadata"
"""Key of the file's metadata under which PyTorch diffusers keeps PEFT's settings, ``{"unet.lora_alpha": 8, ...}``."""

KOHYA = re.compile(r"lora_(unet|te\d?)_")


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
      source: the file (``.safetensors`` or ``.bin``), or the folder that holds :data:`FILE` or :data:`OLD_FILE`.
      shapes: the networks of the pipeline that may have pairs.

    Raises:
      WeightsError: no such file, a key of no known form, a layer that a network does not have, half a pair, or a shape
        that does not fit. Nothing is half-loaded.
    """
    file = _file(Path(source))
    layers = {
        f"{network}.{torch_key((*path, 'kernel')).removesuffix('.weight')}": (network, path)
        for network, tree in shapes.items()
        for path in dense_layers(tree)
    }
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in read_checkpoint([file]).tensors.items():
        stem, kind = _split(file, key)
        if stem not in layers:
            raise bad(file, f"{key!r} belongs to no dense layer of {', '.join(shapes)}: {_why(stem, shapes)}")
        if kind in found.setdefault(stem, {}):
            raise bad(file, f"{key!r} and another key are the same tensor, {kind} of {stem}")
        found[stem][kind] = tensor
    settings = _settings(file)
    flat: dict[tuple[str, ...], Any] = {}
    for stem, parts in found.items():
        network, path = layers[stem]
        pair = _pair(file, stem, parts, dense_layers(shapes[network])[path])
        pair["up"] = _factor(file, stem, parts, settings) * pair["up"]
        flat |= {(network, *path, half): array for half, array in pair.items()}
    return unflatten(flat)


def _file(source: Path) -> Path:
    """The file that a user means."""
    inside = [source / name for name in (FILE, OLD_FILE) if (source / name).is_file()]
    file = source if not source.is_dir() else inside[0] if inside else source / FILE
    if not file.is_file():
        raise WeightsError(
            f"{file}: no such file; LoRA weights are a .safetensors or .bin file or a folder with {FILE}"
        )
    return file


def _split(file: Path, key: str) -> tuple[str, str]:
    """``unet.a.b.lora.down.weight`` -> ``("unet.a.b", "down")``."""
    if KOHYA.match(key):
        raise bad(
            file, f"{key!r} is a name of kohya's scripts; such files are not read, only those of diffusers and PEFT"
        )
    for end, kind in SPELLINGS.items():
        if key.endswith(end):
            network, _, layer = rename(key.removesuffix(end), STEMS).partition(".")
            return f"{network}.{rename(layer, ALIASES)}", kind
    raise bad(file, f"{key!r} is no LoRA tensor; expected names that end in {', '.join(SPELLINGS)}")


def _why(stem: str, shapes: Mapping[str, Params]) -> str:
    """What a layer without a place is."""
    network, _, layer = stem.partition(".")
    kernels = {torch_key(path) for path in flatten(shapes.get(network, {})) if path[-1] == "kernel"}
    return "it is a convolution" if f"{layer}.weight" in kernels else "LoRA of another network?"


def _pair(file: Path, stem: str, parts: dict[str, np.ndarray], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Checked ``down [in, r]`` and ``up [r, out]``, float32."""
    missing = [half for half in PAIR if half not in parts]
    if missing:
        raise bad(file, f"{stem} has no {missing[0]} half")
    down, up = (np.asarray(parts[half], np.float32) for half in PAIR)
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or (down.shape[1], up.shape[0]) != shape:
        raise bad(file, f"{stem}: down {down.shape} and up {up.shape} do not fit a layer from {shape[0]} to {shape[1]}")
    return {"down": down.T, "up": up.T}


def _settings(file: Path) -> dict[str, Any]:
    """PEFT's settings of every network, if the file has them."""
    text = read_metadata(file).get(SETTINGS, "{}") if file.suffix == ".safetensors" else "{}"
    try:
        settings = json.loads(text)
    except (TypeError, json.JSONDecodeError) as error:
        raise bad(file, f"the settings in its metadata ({SETTINGS!r}) are not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise bad(file, f"the settings in its metadata ({SETTINGS!r}) are no object")
    return settings


def _factor(file: Path, stem: str, parts: dict[str, np.ndarray], settings: Mapping[str, Any]) -> float:
    """What the product of a pair is multiplied by: ``alpha / r`` (``alpha / sqrt(r)`` in rsLoRA, arXiv 2312.03732)."""
    network, _, layer = stem.partition(".")
    rank = parts["down"].shape[0]
    patterns = settings.get(f"{network}.alpha_pattern") or {}
    own = (value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer))
    alpha = parts.get("alpha", next(own, settings.get(f"{network}.lora_alpha", rank)))
    root = settings.get(f"{network}.use_rslora") and "alpha" not in parts
    try:
        return float(alpha) / (math.sqrt(rank) if root else rank)
    except (TypeError, ValueError) as error:
        raise bad(file, f"{stem}: alpha is {alpha!r}, not a number") from error
