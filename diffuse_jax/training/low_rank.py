"""Training with low-rank pairs (LoRA, Hu et al. 2021): their settings, a fresh set, and merging them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from diffuse_jax.adapters import lora
from diffuse_jax.models import Params
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.training.settings import LoraSettings


def lora_from(
    settings: LoraSettings, pipe: DiffusionPipeline, names: Sequence[str], seed: int = 0
) -> dict[str, Params]:
    """Fresh pairs, float32, for the networks of these names."""
    keys = jax.random.split(jax.random.key(seed), len(names))
    return {
        name: lora.init(pipe.components[name].shapes(), settings.rank, key, settings.lora_targets)
        for name, key in zip(names, keys, strict=True)
    }


def merged_lora(pipe: DiffusionPipeline) -> Callable[[Any], dict[str, Params]]:
    """Pairs -> parameters of the networks that they change."""
    return lambda pairs: {name: lora.merge(pipe.params[name], own) for name, own in pairs.items()}
