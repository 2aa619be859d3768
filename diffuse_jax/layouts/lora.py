"""LoRA files: which layer a key belongs to, which half of its pair it holds, and how the pair is scaled.

A key consists of the network's name in the pipeline, the layer's PyTorch name, and the kind of tensor:
``unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight``. Releases of diffusers and PEFT
write it differently. A pair is scaled by ``alpha / r``. ``alpha`` is a tensor of the layer, or a setting of PEFT for a
whole network, which newer files keep in their metadata; by default it is ``r``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.errors import bad
from diffuse_jax.layouts.patterns import PLAIN, matches
from diffuse_jax.limits import parse_json
from diffuse_jax.messages import brief
from diffuse_jax.weights.names import ALIASES, Renames, rename
from diffuse_jax.weights.safetensors import read_metadata

SUFFIXES = {
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
"""Suffix of the key -> kind of tensor."""

STEMS: Renames = (
    (r"^(unet\.)+", "unet."),
    (r"^(?!unet\.|text_encoder)", "unet."),
    (r"\.processor\.", "."),
    (r"(attn\d\.to_out)$", r"\1.0"),
    (r"(self_attn)\.to_([qkv])$", r"\1.\2_proj"),
    (r"(self_attn)\.to_out$", r"\1.out_proj"),
)
"""Layer names in older files -> names in checkpoints."""

SETTINGS = "lora_adapter_metadata"
"""The metadata key under which PyTorch diffusers stores PEFT's settings, ``{"unet.lora_alpha": 8, ...}``."""

MAX_ALPHA = 1e6
MAX_PATTERNS = (5000, 32)
"""Maximum number of keys of an ``alpha_pattern``, and of those among them that are not plain names."""

KOHYA = re.compile(r"lora_(unet|te\d?)_")


def split_key(file: Path, key: str) -> tuple[str, str, str]:
    """``unet.a.b.lora.down.weight`` -> ``("unet.a.b", "down", "unet.a.b")``: layer, kind, and the layer's name as is.

    The kind is ``down``, ``up`` or ``alpha``. In the file, ``unet.`` may be missing, and layers may have older names.

    Raises:
      WeightsError: the key has an unknown form.
    """
    if KOHYA.match(key):
        raise bad(
            file, f"{key!r} is in the format of kohya's scripts, which is not supported; use that of diffusers or PEFT"
        )
    for suffix, kind in SUFFIXES.items():
        if key.endswith(suffix):
            name_in_file = key.removesuffix(suffix)
            network, _, layer = rename(name_in_file, STEMS).partition(".")
            return f"{network}.{rename(layer, ALIASES)}", kind, name_in_file
    raise bad(file, f"{key!r} is not a LoRA tensor; expected a name that ends in {', '.join(SUFFIXES)}")


def read_settings(file: Path, layers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's settings for each network that has some, ``{"unet": {"lora_alpha": 8, ...}}``.

    Their names have the network's name as a prefix, as the tensors do, or no prefix if only the UNet was saved.

    Args:
      file: the LoRA file.
      layers: the file's layers, as named by :func:`split_key` -> as named in the file.

    Raises:
      WeightsError: the settings are damaged, or refer to a network or layers without a pair in the file.
    """
    text = read_metadata(file).get(SETTINGS, "{}") if file.suffix == ".safetensors" else "{}"
    flat = parse_json(file, text, what=f"the settings in its metadata ({SETTINGS!r})")
    if not isinstance(flat, dict):
        raise bad(file, f"the settings in its metadata ({SETTINGS!r}) are not an object")
    networks = {stem.partition(".")[0] for stem in layers}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        network, _, name = rename(key, STEMS).rpartition(".")
        if network not in networks:
            raise bad(
                file,
                f"its metadata ({SETTINGS!r}) has {key!r}, but the file has no pairs for {network!r}, only for "
                f"{', '.join(sorted(networks))}; a setting that matches nothing would be ignored",
            )
        settings.setdefault(network, {})[name] = value
    for network, of_network in settings.items():
        _check_patterns(file, network, of_network, layers)
    return settings


def _check_patterns(file: Path, network: str, settings: Mapping[str, Any], layers: Mapping[str, str]) -> None:
    for pattern in checked_patterns(file, settings.get("alpha_pattern")):
        names = (item for item in layers.items() if item[0].startswith(f"{network}."))
        if not any(_matches(file, pattern, *both) for both in names):
            raise bad(
                file, f"the alpha_pattern {brief(pattern)} in its metadata matches no layer of {network} in the file"
            )


def pair_factor(
    file: Path, stem: str, name_in_file: str, parts: Mapping[str, np.ndarray], settings: Mapping[str, Mapping[str, Any]]
) -> float:
    """The scale of a pair's product: ``alpha / r`` (``alpha / sqrt(r)`` in rsLoRA, arXiv 2312.03732).

    Args:
      file: the file that errors name.
      stem: network and layer, as named by :func:`split_key`.
      name_in_file: the same as named in the file.
      parts: the layer's tensors in the file: ``down`` and, if there is one, ``alpha``.
      settings: the file's settings, as returned by :func:`read_settings`.

    Raises:
      WeightsError: ``alpha`` is not a number.
    """
    of_network, rank = settings.get(stem.partition(".")[0], {}), parts["down"].shape[0]
    patterns = checked_patterns(file, of_network.get("alpha_pattern"))
    of_layer = (value for pattern, value in patterns.items() if _matches(file, pattern, stem, name_in_file))
    alpha = parts.get("alpha", next(of_layer, of_network.get("lora_alpha", rank)))
    root = of_network.get("use_rslora") and "alpha" not in parts
    return checked_alpha(file, stem, alpha) / (math.sqrt(rank) if root else rank)


def checked_alpha(file: Path, stem: str, alpha: Any) -> float:
    """The ``alpha`` of a layer as a float.

    Raises:
      WeightsError: it is not a single number within ``MAX_ALPHA``.
    """
    if isinstance(alpha, np.ndarray) and alpha.size == 1:
        alpha = alpha.item()
    if type(alpha) not in (int, float) or not abs(alpha) <= MAX_ALPHA:
        raise bad(file, f"{stem}: alpha is {brief(alpha)}, not a number from -{MAX_ALPHA:g} to {MAX_ALPHA:g}")
    return float(alpha)


def checked_patterns(file: Path, patterns: Any) -> Mapping[str, Any]:
    """PEFT's ``alpha_pattern``, an object whose keys are patterns for layers, mostly plain names.

    Raises:
      WeightsError: it is not an object, or has too many patterns to compare with every layer.
    """
    if patterns is not None and not isinstance(patterns, Mapping):
        raise bad(file, f"the alpha_pattern in its metadata is {brief(patterns)}, not an object")
    patterns = patterns or {}
    if len(patterns) > MAX_PATTERNS[0] or sum(not PLAIN.fullmatch(p) for p in patterns) > MAX_PATTERNS[1]:
        raise bad(file, f"the alpha_pattern in its metadata has more than {MAX_PATTERNS[0]} names or more than "
                        f"{MAX_PATTERNS[1]} patterns")  # fmt: skip
    return patterns


def _matches(file: Path, pattern: str, *names: str) -> bool:
    """Whether one of PEFT's patterns matches a layer, by any of its names.

    Raises:
      WeightsError: the pattern has an unsupported form.
    """
    try:
        return any(matches(pattern, name) for name in names)
    except ValueError as error:
        raise bad(file, f"the alpha_pattern {brief(pattern)} in its metadata is not supported: {error}") from error
