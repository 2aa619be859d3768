"""Writing adapters: one file in the layout of diffusers, PEFT or kohya's scripts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from diffuse_jax.adapters.changes import Change
from diffuse_jax.errors import bad
from diffuse_jax.layouts.lora_names import layer_name
from diffuse_jax.weights.copy import compact
from diffuse_jax.weights.names import Path as LayerPath
from diffuse_jax.weights.safetensors import write_safetensors

Adapter = Mapping[str, Mapping[LayerPath, Change]]

LAYOUTS: dict[str, dict[str, str]] = {
    "diffusers": {"down": "lora.down.weight", "up": "lora.up.weight"},
    "peft": {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
    "kohya": {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "magnitude": "dora_scale"},
}
"""Layout -> kind of tensor -> the end of its key; in that of kohya's scripts, other kinds are their own ends."""

OF_TEXT = {"down": "lora_linear_layer.down.weight", "up": "lora_linear_layer.up.weight"}
"""The ends of text encoders' keys in files of diffusers."""

KOHYA = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
    "controlnet": "lora_controlnet_",
}


def write_adapter(file: Path, adapter: Adapter, to: str = "diffusers", *, two_encoders: bool = False) -> Path:
    """Write an adapter as one ``.safetensors`` file. Tensors keep their dtypes.

    Only kohya's scripts store ``alpha`` beside the factors; for the others it is multiplied into ``up``.

    Args:
      file: the file to write.
      adapter: the adapter; see :func:`~diffuse_jax.adapters.lora_file.read_adapter`.
      to: ``"diffusers"``, ``"peft"`` or ``"kohya"``.
      two_encoders: whether its pipeline has two text encoders, which kohya's scripts number.

    Raises:
      ValueError: an unknown layout.
      WeightsError: the layout cannot hold a change (LoHa, LoKr and whole differences only kohya's).
    """
    if to not in LAYOUTS:
        raise ValueError(f"to must be one of {', '.join(LAYOUTS)}, got {to!r}")
    tensors: dict[str, np.ndarray] = {}
    for network, changes in adapter.items():
        for path, change in changes.items():
            stem = f"{network}.{layer_name(path)}"
            if to == "kohya":
                prefix = "lora_te_" if network == "text_encoder" and not two_encoders else KOHYA[network]
                stem = prefix + layer_name(path).replace(".", "_")
            ends = OF_TEXT if to == "diffusers" and network.startswith("text_encoder") else LAYOUTS[to]
            parts = kohya_parts(change) if to == "kohya" else folded(file, stem, change, ends)
            tensors |= {f"{stem}.{ends.get(kind, kind)}": array for kind, array in parts.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    ordered = dict(sorted(tensors.items()))
    write_safetensors(file, {k: (v.dtype, v.shape) for k, v in ordered.items()}, iter(ordered.values()))
    return file


def kohya_parts(change: Change) -> dict[str, np.ndarray]:
    """The factors as they are, with ``alpha`` where it is not the rank."""
    parts = dict(change.parts)
    if "magnitude" in parts:
        parts["magnitude"] = parts["magnitude"].reshape(-1, *(1,) * (len(change.shape) - 1))
    if change.rank:
        parts["alpha"] = np.asarray(change.factor * change.rank, np.float32)
    elif change.factor != 1:  # whole factors have no alpha
        name = "diff" if "diff" in parts else "lokr_w2"
        parts[name] = scaled(parts[name], change.factor)
    return parts


def folded(file: Path, stem: str, change: Change, ends: Mapping[str, str]) -> dict[str, np.ndarray]:
    """``down``, ``up`` (with the factor) and DoRA's lengths, one for each output."""
    if change.kind != "LoRA":
        raise bad(file, f"{stem} is a {change.kind}, which only the layout of kohya's scripts can hold")
    dtype = change.parts["up"].dtype
    down, up = change.pair()
    ones = (1,) * (len(change.shape) - 2)
    parts = {"down": narrow(down, change.parts["down"].dtype), "up": narrow(up.reshape(*up.shape, *ones), dtype)}
    if not change.needs_weight:
        return parts
    lengths = change.parts.get("magnitude", change.parts.get("dora_scale"))
    if "magnitude" not in ends or lengths is None or lengths.size != change.shape[0]:
        raise bad(
            file, f"{stem} is a DoRA, which this layout cannot hold" + (" by inputs" if "magnitude" in ends else "")
        )
    return parts | {"magnitude": np.ascontiguousarray(lengths).reshape((1, -1, *ones) if ones else (-1,))}


def scaled(array: np.ndarray, factor: float) -> np.ndarray:
    """An array multiplied in float32, in its own dtype."""
    return narrow(compact(array, np.dtype(np.float32)) * np.float32(factor), array.dtype)


def narrow(array: np.ndarray, dtype: Any) -> np.ndarray:
    """An array in another dtype; float8 has too few digits for products, so bfloat16 takes its place."""
    to = np.dtype(ml_dtypes.bfloat16) if np.dtype(dtype).itemsize == 1 else np.dtype(dtype)
    return np.ascontiguousarray(array.astype(to))


def cast(adapter: Adapter, dtype: Any) -> dict[str, dict[LayerPath, Change]]:
    """The adapter with its floating-point factors in another dtype."""
    to = lambda parts: {name: compact(array, np.dtype(dtype)) if array.ndim else array for name, array in parts.items()}
    return {
        network: {path: dataclasses.replace(change, parts=to(change.parts)) for path, change in changes.items()}
        for network, changes in adapter.items()
    }
