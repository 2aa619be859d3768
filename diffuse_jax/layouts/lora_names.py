"""Names of layers in LoRA files: which network of a pipeline and which of its layers a name means.

No name is rewritten: all spellings of a layer follow from the network's own parameters, and names in files are looked
up among them. A spelling is a prefix (:data:`PREFIXES`) and the layer's name, which is that of diffusers or that of the
original checkpoints (``input_blocks.4.1...``), with dots or, in the files of kohya's scripts, with underscores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from diffuse_jax.errors import WeightsError
from diffuse_jax.layouts.original import TABLES
from diffuse_jax.layouts.rows import to_original
from diffuse_jax.weights.names import ALIASES, Path, Renames, flatten, rename, torch_key

SUFFIXES: tuple[tuple[str, str], ...] = (
    (r"(?:_lora|\.lora|\.lora_linear_layer)\.(down|up)\.weight", r"\1"),
    (r"\.lora_A(?:\.\w+)?\.weight", "down"),
    (r"\.lora_B(?:\.\w+)?\.weight", "up"),
    (r"\.lora_(down|up|mid)\.weight", r"\1"),
    (r"\.(hada_(?:w[12]_[ab]|t[12]))", r"\1"),
    (r"\.(lokr_(?:w[12](?:_[ab])?|t2))", r"\1"),
    (r"\.(dora_scale)", r"\1"),
    (r"\.lora_magnitude_vector(?:\.\w+)*", "magnitude"),
    (r"\.diff", "diff"),
    (r"\.scalar", "scalar"),
    (r"(?:(?:_lora|\.lora|\.lora_linear_layer)\.down\.weight)?\.alpha", "alpha"),
)
"""Ends of keys -> kind of tensor: LoRA (diffusers, PEFT, kohya), LoHa, LoKr, DoRA, whole differences, scales."""

OLDER: Renames = (
    (r"\.processor\.", "."),
    (r"(attn\d\.to_out)$", r"\1.0"),
    (r"(self_attn)\.to_([qkv])$", r"\1.\2_proj"),
    (r"(self_attn)\.to_out$", r"\1.out_proj"),
    *ALIASES,
)
"""Layer names of older and newer releases -> names in checkpoints."""

WRAPPERS = re.compile(r"(?:_orig_mod\.|module\.|base_model\.model\.)+")
"""Prefixes of the wrappers that trainers put around a network."""

PREFIXES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (r"lora_unet_|lycoris_", ("unet",), "_"),
    (r"lora_te1?_", ("text_encoder",), "_"),
    (r"lora_te2_", ("text_encoder_2",), "_"),
    (r"lora_controlnet_", ("controlnet",), "_"),
    (r"(?:unet\.)+", ("unet",), "."),
    (r"(?:model\.)?diffusion_model\.", ("unet",), "."),
    (r"text_encoder\.", ("text_encoder",), "."),
    (r"text_encoder_2\.", ("text_encoder_2",), "."),
    (r"(?:text_encoders\.)?clip_[lh]\.(?:transformer\.)?", ("text_encoder",), "."),
    (r"(?:text_encoders\.)?clip_g\.(?:transformer\.)?", ("text_encoder_2",), "."),
    (r"controlnet\.", ("controlnet",), "."),
    (r"prior\.", ("prior",), "."),
    (r"", ("unet", "prior", "text_encoder", "controlnet"), "."),
)
"""Prefix of a name -> the networks that it can mean, and what separates the words behind it."""

ORIGINAL = {"unet": "unet", "controlnet": "controlnet"}
"""Network -> its table in :mod:`~diffuse_jax.layouts.original`."""

JUNK = re.compile(
    r"(^|\.)position_ids$|^bundle_emb\.|^(global_step|epoch|step|iteration)$|\.(rank|initial_norm|logit_scale)$"
    r"|^(optimizer|lr_scheduler|ema|grad_scaler)\."
)
"""Keys that trainers leave in files and no layer needs: buffers, counters, ranks, optimisers, bundled embeddings."""

ARCHITECTURES = (
    (r"single_transformer_blocks|single_blocks[._]\d", "FLUX"),
    (r"joint_blocks|add_q_proj", "Stable Diffusion 3"),
    (r"img_mlp|txt_mlp", "Qwen-Image"),
    (r"token_refiner", "HunyuanVideo"),
    (r"blocks[._]\d+[._](self_attn|cross_attn)[._]", "Wan"),
    (r"^(transformer|lora_transformer)[._]", "a transformer (PixArt, SD 3, FLUX ...)"),
    (r"^prior[._]|lora_prior_unet", "Stable Cascade"),
)
"""Keys -> the architecture of the network that a file was made for."""

WIDTHS = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    2048: "Stable Diffusion XL",
    1280: "the refiner of Stable Diffusion XL",
}
"""Width of the prompt embeddings -> the architecture."""


def split_suffix(key: str) -> tuple[str, str] | None:
    """``a.b.lora_down.weight`` -> ``("a.b", "down")``; None if the key has no known end."""
    for pattern, kind in SUFFIXES:
        if found := re.search(rf"(?:{pattern})$", key):
            return key[: found.start()], found.expand(kind)
    return None


def finder(shapes: Mapping[str, Mapping[str, Any]]) -> Callable[[str], tuple[str, Path] | None]:
    """A function from a name to ``(network, path of the layer)``, or None if no layer has this name.

    Args:
      shapes: network -> its tree of shapes.
    """
    spellings = {network: spellings_of(network, tree) for network, tree in shapes.items()}
    flat = {n: {name.replace(".", "_"): path for name, path in table.items()} for n, table in spellings.items()}
    tables = {".": spellings, "_": flat}

    def find(name: str) -> tuple[str, Path] | None:
        name = WRAPPERS.sub("", name, count=1) if WRAPPERS.match(name) else name
        for prefix, networks, separator in PREFIXES:
            if not (found := re.match(prefix, name)):
                continue
            rest = name[found.end() :]
            for network in networks:
                table = tables[separator].get(network, {})
                path = table.get(rest) or table.get(rename(rest, OLDER))
                if path is not None:
                    return network, path
        return None

    return find


def spellings_of(network: str, tree: Mapping[str, Any]) -> dict[str, Path]:
    """Dotted name -> path, for every layer with a kernel: its name in diffusers, and that in original checkpoints."""
    names = {layer_name(path[:-1]): path[:-1] for path in flatten(tree) if path[-1] == "kernel"}
    return {original: names[name] for original, name in original_names(network, names).items()} | names


def original_names(network: str, names: Iterable[str]) -> dict[str, str]:
    """Name in original checkpoints -> name in diffusers; empty for networks that have only one."""
    names = list(names)
    if network not in ORIGINAL:
        return {}
    try:
        table = TABLES[ORIGINAL[network]](f"{name}.weight" for name in names)
        groups = to_original((f"{name}.weight" for name in names), table)
    except WeightsError:  # a UNet of another form has no such names
        return {}
    return {old.removesuffix(".weight"): parts[0][0].removesuffix(".weight") for old, parts in groups.items()}


def layer_name(path: Path) -> str:
    """The name of a layer in diffusers' checkpoints, for its path."""
    return torch_key((*path, "kernel")).removesuffix(".weight")


def made_for(tensors: Mapping[str, np.ndarray]) -> str | None:
    """The architecture that a file was made for, as far as its keys and shapes say it."""
    for pattern, name in ARCHITECTURES:
        if any(re.search(pattern, key) for key in tensors):
            return name
    for key, array in tensors.items():
        if re.search(r"attn2[._](processor\.)?to_[kv]([._]lora.*(down|A)|\.lora_A.*)\.weight$", key) and array.ndim > 1:
            return WIDTHS.get(array.shape[1])
    return WIDTHS[2048] if any(key.startswith("lora_te2_") for key in tensors) else None


def architecture_of(shapes: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The architecture of a pipeline's UNet, in the same words."""
    kernels = flatten(shapes.get("unet", {})).items()
    return next((WIDTHS.get(leaf.shape[0]) for path, leaf in kernels if path[-3:-1] == ("attn2", "to_k")), None)
