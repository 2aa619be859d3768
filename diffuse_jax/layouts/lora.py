"""LoRA files: which layer a key belongs to, which half of its pair it holds, and what the pair is multiplied by.

A key is the network's name in the pipeline, the layer's PyTorch name, and the kind of the tensor:
``unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight``. Releases of diffusers and PEFT
spell it differently. A pair acts with the factor ``alpha / r``; ``alpha`` is a tensor of the layer, or stands for a
whole network in the settings of PEFT that newer files keep in their metadata, and is ``r`` where nothing says
otherwise.
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

MAX_ALPHA = 1e6
MAX_PATTERNS = (5000, 32)
"""Keys of an ``alpha_pattern``, and those among them that are more than names."""

KOHYA = re.compile(r"lora_(unet|te\d?)_")


def split_key(file: Path, key: str) -> tuple[str, str, str]:
    """``unet.a.b.lora.down.weight`` -> ``("unet.a.b", "down", "unet.a.b")``: layer, kind, and the layer as spelled.

    The kind is ``down``, ``up`` or ``alpha``. The UNet's name may be missing, and layers may have older names.

    Raises:
      WeightsError: the key is of no known form.
    """
    if KOHYA.match(key):
        raise bad(
            file, f"{key!r} is a name of kohya's scripts; such files are not read, only those of diffusers and PEFT"
        )
    for end, kind in SPELLINGS.items():
        if key.endswith(end):
            spelled = key.removesuffix(end)
            network, _, layer = rename(spelled, STEMS).partition(".")
            return f"{network}.{rename(layer, ALIASES)}", kind, spelled
    raise bad(file, f"{key!r} is no LoRA tensor; expected names that end in {', '.join(SPELLINGS)}")


def read_settings(file: Path, layers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's settings of every network in the file that has any, ``{"unet": {"lora_alpha": 8, ...}}``.

    Their names begin with the network's, as the tensors' do, or with nothing where the UNet alone was saved.

    Args:
      file: what is read.
      layers: the layers with pairs in the file, as :func:`split_key` gives them -> as the file spells them.

    Raises:
      WeightsError: the settings are damaged, or stand for a network or for layers that have no pair in the file.
    """
    text = read_metadata(file).get(SETTINGS, "{}") if file.suffix == ".safetensors" else "{}"
    flat = parse_json(file, text, what=f"the settings in its metadata ({SETTINGS!r})")
    if not isinstance(flat, dict):
        raise bad(file, f"the settings in its metadata ({SETTINGS!r}) are no object")
    networks = {stem.partition(".")[0] for stem in layers}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        network, _, name = rename(key, STEMS).rpartition(".")
        if network not in networks:
            raise bad(
                file,
                f"its metadata ({SETTINGS!r}) has {key!r}, but the file has no pairs for {network!r}, only for "
                f"{', '.join(sorted(networks))}; a setting that matches nothing would be lost",
            )
        settings.setdefault(network, {})[name] = value
    for network, own in settings.items():
        _check_patterns(file, network, own, layers)
    return settings


def _check_patterns(file: Path, network: str, settings: Mapping[str, Any], layers: Mapping[str, str]) -> None:
    for pattern in checked_patterns(file, settings.get("alpha_pattern")):
        here = ((stem, spelled) for stem, spelled in layers.items() if stem.startswith(f"{network}."))
        if not any(_matches(file, pattern, stem, spelled) for stem, spelled in here):
            raise bad(
                file, f"the alpha_pattern {brief(pattern)} in its metadata matches no layer of {network} in the file"
            )


def pair_factor(
    file: Path, stem: str, spelled: str, parts: Mapping[str, np.ndarray], settings: Mapping[str, Mapping[str, Any]]
) -> float:
    """What the product of a pair is multiplied by: ``alpha / r`` (``alpha / sqrt(r)`` in rsLoRA, arXiv 2312.03732).

    Args:
      file: what errors name.
      stem: network and layer, as :func:`split_key` gives them.
      spelled: the same as the file spells it.
      parts: ``down`` and, where the layer has one, ``alpha``, as the file holds them.
      settings: of the file, as :func:`read_settings` gives them.

    Raises:
      WeightsError: ``alpha`` is not a number.
    """
    own, rank = settings.get(stem.partition(".")[0], {}), parts["down"].shape[0]
    patterns = checked_patterns(file, own.get("alpha_pattern"))
    of_layer = (value for pattern, value in patterns.items() if _matches(file, pattern, stem, spelled))
    alpha = parts.get("alpha", next(of_layer, own.get("lora_alpha", rank)))
    root = own.get("use_rslora") and "alpha" not in parts
    return checked_alpha(file, stem, alpha) / (math.sqrt(rank) if root else rank)


def checked_alpha(file: Path, stem: str, alpha: Any) -> float:
    """The ``alpha`` of a layer, which must be one finite number that can be a strength.

    Raises:
      WeightsError: it is not.
    """
    if isinstance(alpha, np.ndarray) and alpha.size == 1:
        alpha = alpha.item()
    if type(alpha) not in (int, float) or not abs(alpha) <= MAX_ALPHA:
        raise bad(file, f"{stem}: alpha is {brief(alpha)}, not a number from -{MAX_ALPHA:g} to {MAX_ALPHA:g}")
    return float(alpha)


def checked_patterns(file: Path, patterns: Any) -> Mapping[str, Any]:
    """PEFT's ``alpha_pattern``, an object whose keys are patterns for layers; few of them are more than names.

    Raises:
      WeightsError: it is something else, or there are too many to be compared with every layer.
    """
    if patterns is not None and not isinstance(patterns, Mapping):
        raise bad(file, f"the alpha_pattern in its metadata is {brief(patterns)}, not an object")
    patterns = patterns or {}
    if len(patterns) > MAX_PATTERNS[0] or sum(not PLAIN.fullmatch(p) for p in patterns) > MAX_PATTERNS[1]:
        raise bad(file, f"the alpha_pattern in its metadata has more than {MAX_PATTERNS[0]} names or more than "
                        f"{MAX_PATTERNS[1]} patterns")  # fmt: skip
    return patterns


def _matches(file: Path, pattern: str, *names: str) -> bool:
    """Whether a pattern of PEFT means a layer, by any of its names.

    Raises:
      WeightsError: the pattern is not of a form that is read.
    """
    try:
        return any(matches(pattern, name) for name in names)
    except ValueError as error:
        raise bad(file, f"the alpha_pattern {brief(pattern)} in its metadata is not read: {error}") from error
