"""LoRA files: read into one form from every layout, and written in that of PyTorch diffusers.

The layouts are described by :mod:`diffuse_jax.layouts.lora_names`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffuse_jax.adapters.changes import Change, problem, rank_of
from diffuse_jax.adapters.lora import PAIR, pairs_of
from diffuse_jax.adapters.lora_writer import write_adapter
from diffuse_jax.errors import WeightsError, bad
from diffuse_jax.layouts.kinds import held
from diffuse_jax.layouts.lora import pair_factor, read_settings
from diffuse_jax.layouts.lora_names import (
    JUNK,
    architecture_of,
    finder,
    layer_name,
    made_for,
    split_suffix,
)
from diffuse_jax.limits import absence, refuse_links
from diffuse_jax.messages import brief, warn
from diffuse_jax.models.base import Params
from diffuse_jax.weights.copy import refuse_not_finite
from diffuse_jax.weights.load import read_checkpoint
from diffuse_jax.weights.names import Path as LayerPath
from diffuse_jax.weights.names import flatten, from_torch, to_torch, unflatten
from diffuse_jax.weights.torch_file import read_torch_object
from diffuse_jax.writing import expanded

FILE = "pytorch_lora_weights.safetensors"
OLD_FILE = "pytorch_lora_weights.bin"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
NOT_WEIGHTS = ("scheduler", "optimizer", "checkpoint", "random_states")
"""Words in the names of other files that trainers write beside the weights."""

SHOWN = 6
"""How many keys an error shows."""

Adapter = dict[str, dict[LayerPath, Change]]
"""Network -> path of the layer -> the change of its kernel."""


def read_adapter(
    source: str | Path, shapes: Mapping[str, Params], *, weight_name: str | None = None, strict: bool = True
) -> Adapter:
    """Read a LoRA, LoHa, LoKr or DoRA file in any layout for networks of these shapes.

    Args:
      source: the file (``.safetensors``, ``.bin``, ``.pt``), or the folder that holds it.
      shapes: the networks that may have adapters, ``{"unet": model.shapes(), ...}``.
      weight_name: the file in the folder, if there are several.
      strict: refuse files with keys that belong to no layer; otherwise these are left out with one warning.

    Raises:
      WeightsError: the file does not exist, has keys that belong to no layer, factors that do not fit their layer or
        are not finite, or settings that match nothing in it. Nothing is loaded in part.
    """
    file = adapter_file(expanded(source), weight_name)
    tensors = dict(read_checkpoint([file]).tensors) | _numbers(file)
    find = finder(shapes)
    found: dict[tuple[str, LayerPath], dict[str, np.ndarray]] = {}
    names_in_file: dict[str, str] = {}
    homeless: list[str] = []
    for key, tensor in tensors.items():
        if JUNK.search(key):
            continue
        split = split_suffix(key)
        home = split and find(split[0])
        if not split or not home:
            homeless.append(key)
            continue
        parts = found.setdefault(home, {})
        if split[1] in parts:
            raise bad(file, f"{key!r} and another key are the same tensor, {split[1]} of {stem_of(*home)}")
        parts[split[1]] = tensor
        names_in_file[stem_of(*home)] = split[0]
    if homeless:
        message = _homeless(file, homeless, tensors, shapes)
        if strict or not found:
            raise WeightsError(message)
        warn(message)
    if not found:
        raise bad(file, "holds no tensors of a LoRA")
    settings = read_settings(file, names_in_file)
    kernels = {name: flatten(tree) for name, tree in shapes.items()}
    adapter: Adapter = {}
    for (network, path), parts in found.items():
        shape = torch_shape(kernels[network][(*path, "kernel")].shape)
        stem = stem_of(network, path)
        if wrong := problem(parts, shape):
            raise bad(file, f"{stem}: {wrong}{_hint(tensors, shapes)}")
        for part, tensor in parts.items():
            if part != "alpha":  # a setting, whose range is checked with those of PEFT
                refuse_not_finite(file, f"{part} of {stem}", tensor)
        factor = pair_factor(file, stem, names_in_file[stem], rank_of(parts), parts.get("alpha"), settings)
        adapter.setdefault(network, {})[path] = Change(parts, shape, factor)
    return adapter


def load_lora(source: str | Path, shapes: Mapping[str, Params], **options: Any) -> dict[str, Params]:
    """Read a file as trees of pairs ``{..., "to_q": {"down", "up"}}`` in float32, ``alpha`` folded into ``up``.

    Args:
      source, shapes: as in :func:`read_adapter`, like all other options.

    Raises:
      WeightsError: as in :func:`read_adapter`, or a change is not a product of two matrices (LoHa, LoKr, DoRA).
    """
    flat: dict[LayerPath, Any] = {}
    for network, changes in read_adapter(source, shapes, **options).items():
        for path, change in changes.items():
            if not change.low_rank:
                kind = "DoRA" if change.needs_weight else change.kind
                raise bad(source, f"{stem_of(network, path)} is a {kind}, not a pair; merge it with load_lora_weights")
            flat |= {(network, *path, half): array for half, array in flax_pair(change).items()}
    return unflatten(flat)


def flax_pair(change: Change) -> dict[str, np.ndarray]:
    """``down [*window, in, r]`` and ``up [r, out]`` of a low-rank change."""
    down, up = change.pair()
    return {"down": from_torch(("kernel",), down), "up": up.T}


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``[*window, in, out]`` of a kernel as ``[out, in, *window]``."""
    return to_torch(("kernel",), np.broadcast_to(np.zeros((), bool), shape)).shape


def stem_of(network: str, path: LayerPath) -> str:
    """The name of a layer in files of diffusers, ``unet.mid_block...``."""
    return f"{network}.{layer_name(path)}"


def adapter_file(source: Path, weight_name: str | None = None) -> Path:
    """The LoRA file of a path, which may be the file itself or its folder.

    Raises:
      WeightsError: there is none, or the folder has several.
    """
    if not source.is_dir():
        file = source
    elif weight_name is not None:
        file = refuse_links(source) / weight_name
    else:
        names = sorted(path.name for path in refuse_links(source).iterdir() if path.suffix.lower() in ENDINGS)
        names = [name for name in names if not any(word in name for word in NOT_WEIGHTS)]
        known = [name for name in (FILE, OLD_FILE, *PEFT_FILES) if name in names] or names
        if len(known) > 1 and known == names and names[0] not in (FILE, OLD_FILE, *PEFT_FILES):
            raise WeightsError(f"{source}: holds {brief(names)}; choose one with weight_name=")
        file = source / (known[0] if known else FILE)
    if not file.is_file():
        raise WeightsError(
            f"{file}: {absence(file)}; expected a .safetensors, .bin or .pt file, or a folder with {FILE}"
        )
    return file


def _numbers(file: Path) -> dict[str, np.ndarray]:
    """The plain numbers of a pickle that are some layer's alpha; its tensors are read without them."""
    tree = read_torch_object(file) if file.suffix.lower() not in (".safetensors", ".msgpack") else {}
    while isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
        tree = tree["state_dict"]
    found = tree.items() if isinstance(tree, dict) else ()
    return {
        k: np.asarray(v) for k, v in found if isinstance(k, str) and k.endswith(".alpha") and type(v) in (int, float)
    }


def _homeless(file: Path, keys: list[str], tensors: Mapping[str, Any], shapes: Mapping[str, Params]) -> str:
    """The message about keys that belong to no layer."""
    shown = ", ".join(map(repr, keys[:SHOWN])) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
    where, about = ", ".join(shapes), held(keys, "a LoRA,") + _hint(tensors, shapes)
    return f"{file}: {len(keys)} keys belong to no layer of {where}: {shown}.{about}"


def _hint(tensors: Mapping[str, Any], shapes: Mapping[str, Params]) -> str:
    """Which architecture a file was made for, if it is another one."""
    made, have = made_for(tensors), architecture_of(shapes)
    if made is None or made == have:
        return ""
    return f" This LoRA is for {made}" + (f"; the pipeline is {have}." if have else ".")


def save_lora(folder: str | Path, pairs: Mapping[str, Params], *, to: str = "diffusers") -> Path:
    """Write the pairs of a pipeline's networks, ``{"unet": ..., "text_encoder": ...}``, as :data:`FILE` in a folder.

    Args:
      folder: created if needed.
      pairs: network -> tree of pairs; those of convolutions have ``down [k,k,in,r]``.
      to: the layout, ``"diffusers"``, ``"peft"`` or ``"kohya"``.

    Returns:
      The file.
    """
    adapter = {network: changes_of(tree) for network, tree in pairs.items()}
    return write_adapter(expanded(folder) / FILE, adapter, to, two_encoders="text_encoder_2" in pairs)


def changes_of(pairs: Params) -> dict[LayerPath, Change]:
    """The changes that a tree of pairs makes."""
    found = {}
    for path, pair in pairs_of(pairs).items():
        down, up = (np.asarray(jax.device_get(pair[half])) for half in PAIR)
        window = (1,) * (down.ndim - 2)
        parts = {"down": to_torch(("kernel",), down), "up": up.T.reshape(*up.T.shape, *window)}
        found[path] = Change(parts, (up.shape[1], *parts["down"].shape[1:]))
    return found
