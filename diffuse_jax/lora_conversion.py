"""LoRA files converted between layouts, and extracted from two checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.adapters.changes import Change
from diffuse_jax.adapters.lora_file import Adapter, adapter_file, read_adapter, stem_of, torch_shape
from diffuse_jax.adapters.lora_writer import cast, write_adapter
from diffuse_jax.convert import Network, open_source
from diffuse_jax.errors import WeightsError, bad
from diffuse_jax.layouts.lora_names import WIDTHS, made_for
from diffuse_jax.models import Model, Params, UNet2DConditionModel
from diffuse_jax.models.base import floating_type
from diffuse_jax.models.presets import SD15_UNET, SD21_UNET, SDXL_UNET
from diffuse_jax.output import writable
from diffuse_jax.text import CLIPTextModel, CLIPTextModelWithProjection
from diffuse_jax.text.presets import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H
from diffuse_jax.weights import names
from diffuse_jax.weights.copy import compact, forget
from diffuse_jax.weights.load import read_checkpoint
from diffuse_jax.writing import expanded

PUBLISHED: dict[str, dict[str, tuple[type[Model], Any]]] = {
    WIDTHS[768]: {"unet": (UNet2DConditionModel, SD15_UNET), "text_encoder": (CLIPTextModel, CLIP_L)},
    WIDTHS[1024]: {"unet": (UNet2DConditionModel, SD21_UNET), "text_encoder": (CLIPTextModel, OPENCLIP_H)},
    WIDTHS[2048]: {
        "unet": (UNet2DConditionModel, SDXL_UNET),
        "text_encoder": (CLIPTextModel, CLIP_L),
        "text_encoder_2": (CLIPTextModelWithProjection, OPENCLIP_BIGG),
    },
}
"""Architecture -> its networks, whose layers' names a file is read with."""


def convert_lora(
    src: str | Path, dst: str | Path, to: str = "diffusers", *, model: str | Path | None = None, dtype: Any = None
) -> Path:
    """Convert a LoRA file to another layout, and verify that it changes every layer as before.

    Args:
      src: the file or its folder, in any layout.
      dst: the ``.safetensors`` file to write; it must not exist.
      to: ``"diffusers"``, ``"peft"`` or ``"kohya"``.
      model: the folder of the pipeline that it is for; None for Stable Diffusion 1, 2 or XL, which the file shows.
      dtype: cast the factors to this dtype; None leaves them unchanged.

    Raises:
      WeightsError: the file cannot be read, or the layout cannot hold it.
      ValueError: the layout is unknown, or ``dst`` does not end in ``.safetensors``.
      FileExistsError: ``dst`` exists.
    """
    dst = new_file(dst)
    shapes = shapes_of(adapter_file(expanded(src))) if model is None else shapes_in(model)
    adapter = read_adapter(src, shapes)
    narrow = adapter if dtype is None else cast(adapter, floating_type(dtype))
    try:
        write_adapter(dst, narrow, to, two_encoders="text_encoder_2" in shapes)
        verify(dst, adapter, read_adapter(dst, shapes), shapes)
    except BaseException:
        dst.unlink(missing_ok=True)
        raise
    return dst


def new_file(dst: str | Path) -> Path:
    """A path that can be written, checked before anything is read.

    Raises:
      OSError: files cannot be written beside it.
      ValueError: it does not end in ``.safetensors``.
      FileExistsError: it exists.
    """
    dst = expanded(dst)
    if dst.suffix != ".safetensors":
        raise ValueError(f"a LoRA is written as safetensors; {dst} does not end in .safetensors")
    if os.path.lexists(dst):
        raise FileExistsError(f"{dst} exists; remove it or choose another path")
    writable(next(folder for folder in dst.parents if folder.exists()))
    return dst


def shapes_of(file: Path) -> dict[str, Params]:
    """The networks of the published architecture that a file was made for.

    Raises:
      WeightsError: the file does not show it.
    """
    made = made_for(read_checkpoint([file]).tensors)
    if made not in PUBLISHED:
        known = ", ".join(PUBLISHED)
        raise bad(
            file, f"is for {made or 'an unknown architecture'}, not for {known}; pass model= (--model), the pipeline"
        )
    return {name: kind(config).shapes() for name, (kind, config) in PUBLISHED[made].items()}


def shapes_in(model: str | Path) -> dict[str, Params]:
    """The networks of a pipeline's folder that may have adapters."""
    return {name: network.model.shapes() for name, network in adaptable(open_source(model).networks).items()}


def adaptable(networks: Mapping[str, Network]) -> dict[str, Network]:
    """The networks that may have adapters, by component."""
    return {name: net for name, net in networks.items() if name in ("unet", "controlnet") or name.startswith("text_")}


def verify(file: Path, before: Adapter, after: Adapter, shapes: Mapping[str, Params]) -> None:
    """Check that an adapter changes kernels as another one does, up to what the narrower of their dtypes can hold.

    Raises:
      WeightsError: it does not.
    """
    for network, changes in before.items():
        for path, change in changes.items():
            new = after.get(network, {}).get(path)
            if new is None:
                raise bad(file, f"{stem_of(network, path)} is missing after writing")
            weight = np.ones(change.shape, np.float32) if change.needs_weight else None
            a, b = change.difference(weight), new.difference(weight)
            narrow = any(part.dtype.itemsize < 4 for c in (change, new) for part in c.parts.values() if part.ndim > 1)
            atol = (3e-2 if narrow else 1e-5) * max(float(np.abs(a).max()), 1e-6)
            if not np.allclose(a, b, rtol=0, atol=atol):
                raise bad(file, f"{stem_of(network, path)} differs from its source after writing")


def extract_lora(
    base: str | Path,
    tuned: str | Path,
    dst: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    to: str = "diffusers",
    dtype: Any = None,
) -> Path:
    """Write the difference of two checkpoints as a LoRA: of each layer's, the largest singular values and vectors.

    One layer is in memory at a time, besides the result. Layers that are equal get no pair.

    Args:
      base, tuned: folders, Hub ids or single files of the same architecture.
      dst: the ``.safetensors`` file to write; it must not exist.
      rank: how many singular values each layer keeps.
      energy: or the share of the difference's squared norm to keep, above 0 and at most 1; ``rank`` then bounds it.
      to: the layout, as in :func:`convert_lora`.
      dtype: of the pairs; float32 if None.

    Raises:
      WeightsError: a checkpoint cannot be read, they have different layers, or they are equal.
      ValueError: neither ``rank`` nor ``energy`` was given, or one is out of range.
      FileExistsError: ``dst`` exists.
    """
    if rank is None and energy is None:
        raise ValueError("give rank=, energy=, or both")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise ValueError(f"rank must be at least 1 and energy above 0 and at most 1, got rank={rank}, energy={energy}")
    dst = new_file(dst)
    old, new = (adaptable(open_source(source).networks) for source in (base, tuned))
    if not old.keys() & new.keys():
        raise WeightsError(f"{base} and {tuned} have no network in common that a LoRA can change; give whole pipelines")
    adapter: dict[str, dict[names.Path, Change]] = {}
    for network in old.keys() & new.keys():
        a, b = old[network].views, new[network].views
        if {path: v.shape for path, v in a.items()} != {path: v.shape for path, v in b.items()}:
            raise WeightsError(f"{network} of {base} and of {tuned} have different layers or shapes")
        for path in sorted(a):
            if path[-1] == "kernel" and (change := extracted(a[path], b[path], rank, energy)):
                adapter.setdefault(network, {})[path[:-1]] = change
    if not adapter:
        raise WeightsError(f"{base} and {tuned} have the same kernels; there is nothing to extract")
    written = adapter if dtype is None else cast(adapter, floating_type(dtype))
    return write_adapter(dst, written, to, two_encoders="text_encoder_2" in old)


def extracted(old: np.ndarray, new: np.ndarray, rank: int | None, energy: float | None) -> Change | None:
    """The change from one kernel to another, as a pair; None if they are equal."""
    wide = np.dtype(np.float32)
    difference = names.to_torch(("kernel",), compact(new, wide) - compact(old, wide))
    forget(old)
    forget(new)
    if not difference.any():
        return None
    shape = torch_shape(old.shape)
    u, s, vt = np.linalg.svd(difference.reshape(shape[0], -1), full_matrices=False)
    keep = len(s)
    if energy is not None:
        share = np.cumsum(np.square(s.astype(np.float64)))
        keep = int(np.searchsorted(share, energy * share[-1] * (1 - 1e-9)) + 1)
    keep = min(keep, rank or keep, len(s))
    root = np.sqrt(s[:keep])  # both halves get the same size, which keeps them within float16
    up, down = u[:, :keep] * root, root[:, None] * vt[:keep]
    ones = (1,) * (len(shape) - 2)
    return Change({"down": down.reshape(keep, *shape[1:]), "up": up.reshape(shape[0], keep, *ones)}, shape)
