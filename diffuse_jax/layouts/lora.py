"""LoRA files: how the factors of a layer are scaled.

They are scaled by ``alpha / r``. ``alpha`` is a tensor of the layer, or a setting of PEFT for a whole network, which
diffusers keeps in a file's metadata and PEFT in ``adapter_config.json`` beside it; by default it is ``r``. Which layer
a key belongs to is the subject of :mod:`diffuse_jax.layouts.lora_names`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.errors import bad
from diffuse_jax.layouts.patterns import PLAIN, matches
from diffuse_jax.limits import parse_json
from diffuse_jax.messages import brief
from diffuse_jax.weights.files import read_json
from diffuse_jax.weights.names import Renames, rename
from diffuse_jax.weights.safetensors import read_metadata

NETWORKS: Renames = ((r"^(unet\.)+", "unet."), (r"^(?!unet\.|text_encoder|controlnet\.)", "unet."))
"""Names of settings -> with one network's name before them."""

SETTINGS = "lora_adapter_metadata"
"""The metadata key under which PyTorch diffusers stores PEFT's settings, ``{"unet.lora_alpha": 8, ...}``."""

CONFIG = "adapter_config.json"
"""PEFT's settings, in a file beside ``adapter_model.safetensors``."""

HONOURED = ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
HARMLESS = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "bias"),
    *("modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "megatron_config"),
    *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("runtime_config", "lora_bias", "target_parameters", "ensure_weight_tying", "qalora_group_size"),
    *("init_weights", "rank_dropout", "rank_dropout_scale", "module_dropout"),  # of LoHa and LoKr
    *("use_effective_conv2d", "decompose_both", "decompose_factor"),
)
"""Settings of PEFT that say which layers are trained, how, or from which values; their tensors are in the file anyway.

Others change what is computed, or do not exist; they are accepted only if they are off."""

MAX_ALPHA = 1e6
MAX_PATTERNS = (5000, 32)
"""Maximum number of keys of an ``alpha_pattern``, and of those among them that are not plain names."""


def read_settings(file: Path, layers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's settings for each network that has some, ``{"unet": {"lora_alpha": 8, ...}}``.

    Their names have the network's name as a prefix, as the tensors do, or no prefix if only the UNet was saved.

    Args:
      file: the LoRA file.
      layers: the file's layers, as named by ``diffuse_jax.adapters.lora_file.stem_of`` -> as named in the file.

    Raises:
      WeightsError: the settings are damaged, unknown or contradictory, or refer to a network or layers without a pair
        in the file.
    """
    networks = {stem.partition(".")[0] for stem in layers}
    text = read_metadata(file).get(SETTINGS, "{}") if file.suffix.lower() == ".safetensors" else "{}"
    flat = parse_json(file, text, what=f"the settings in its metadata ({SETTINGS!r})", unique=True)
    if not isinstance(flat, dict):
        raise bad(file, f"the settings in its metadata ({SETTINGS!r}) are not an object")
    beside = file.parent / CONFIG
    if not flat and file.name.startswith("adapter_model.") and len(networks) == 1 and beside.is_file():
        flat = {f"{next(iter(networks))}.{name}": value for name, value in read_json(beside).items()}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        network, _, name = rename(key, NETWORKS).rpartition(".")
        if network not in networks:
            raise bad(
                file,
                f"its metadata ({SETTINGS!r}) has {key!r}, but the file has no pairs for {network!r}, only for "
                f"{', '.join(sorted(networks))}; a setting that matches nothing would be ignored",
            )
        if name not in (*HONOURED, *HARMLESS) and value:
            raise bad(file, f"its metadata ({SETTINGS!r}) has {brief(key)}, which is no setting that is supported")
        if name.startswith("use_") and not isinstance(value, bool | None):
            raise bad(file, f"its metadata ({SETTINGS!r}) has {key!r}, which must be true or false, got {brief(value)}")
        if name in settings.setdefault(network, {}):
            raise bad(file, f"its metadata ({SETTINGS!r}) has {name!r} of {network} twice, with different prefixes")
        settings[network][name] = value
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
    file: Path,
    stem: str,
    name_in_file: str,
    rank: int,
    alpha: np.ndarray | None,
    settings: Mapping[str, Mapping[str, Any]],
) -> float:
    """The scale of a pair's product: ``alpha / r`` (``alpha / sqrt(r)`` in rsLoRA, arXiv 2312.03732).

    Args:
      file: the file that errors name.
      stem: network and layer, as named by ``diffuse_jax.adapters.lora_file.stem_of``.
      name_in_file: the same as named in the file.
      rank: ``r``; 0 for a change without an inner dimension, which is not scaled.
      alpha: the layer's ``alpha`` in the file, if there is one.
      settings: the file's settings, as returned by :func:`read_settings`.

    Raises:
      WeightsError: ``alpha`` is not a number.
    """
    of_network = settings.get(stem.partition(".")[0], {})

    def setting(pattern_name: str, name: str) -> Any:
        patterns = checked_patterns(file, of_network.get(pattern_name), pattern_name)
        of_layer = (value for pattern, value in patterns.items() if _matches(file, pattern, stem, name_in_file))
        return next(of_layer, of_network.get(name))

    own = setting("alpha_pattern", "alpha" if "alpha" in of_network else "lora_alpha")
    given = own if alpha is None else alpha
    if not rank and alpha is None and own is not None:  # PEFT scales whole factors by the rank that it was asked for
        asked = setting("rank_pattern", "r")
        rank = asked if type(asked) is int and asked > 0 else 0
    value = checked_alpha(file, stem, rank if given is None else given)
    if not rank:
        return 1.0
    root = of_network.get("use_rslora") and alpha is None
    return value / (math.sqrt(rank) if root else rank)


def checked_alpha(file: Path, stem: str, alpha: Any) -> float:
    """The ``alpha`` of a layer as a float.

    Raises:
      WeightsError: it is not a single number within ``MAX_ALPHA``.
    """
    if isinstance(alpha, np.ndarray) and alpha.size == 1:
        alpha = alpha.astype(np.float64).item()  # bfloat16 and float8 scalars are not Python's floats
    if type(alpha) not in (int, float) or not abs(alpha) <= MAX_ALPHA:
        raise bad(file, f"{stem}: alpha is {brief(alpha)}, not a number from -{MAX_ALPHA:g} to {MAX_ALPHA:g}")
    return float(alpha)


def checked_patterns(file: Path, patterns: Any, name: str = "alpha_pattern") -> Mapping[str, Any]:
    """PEFT's ``alpha_pattern`` or ``rank_pattern``, an object whose keys are patterns for layers, mostly plain names.

    Raises:
      WeightsError: it is not an object, or has too many patterns to compare with every layer.
    """
    if patterns is not None and not isinstance(patterns, Mapping):
        raise bad(file, f"the {name} in its metadata is {brief(patterns)}, not an object")
    patterns = patterns or {}
    if len(patterns) > MAX_PATTERNS[0] or sum(not PLAIN.fullmatch(p) for p in patterns) > MAX_PATTERNS[1]:
        raise bad(file, f"the {name} in its metadata has more than {MAX_PATTERNS[0]} names or more than "
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
