"""Training low-rank adapters (LoRA, Hu et al. 2021): initialising and merging them."""

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
    """Initial low-rank pairs, float32, for the networks with these names."""
    keys = jax.random.split(jax.random.key(seed), len(names))
    return {
        name: lora.init(pipe.components[name].shapes(), settings.rank, key, settings.lora_targets)
        for name, key in zip(names, keys, strict=True)
    }


def lora_shapes(settings: LoraSettings, pipe: DiffusionPipeline, names: Sequence[str]) -> dict[str, Params]:
    """The shapes of :func:`lora_from`.

    Raises:
      ValueError: no layer matches the targets, or none can have this rank.
    """
    return jax.eval_shape(lambda: lora_from(settings, pipe, names))


def merged_lora(pipe: DiffusionPipeline) -> Callable[[Any], dict[str, Params]]:
    """A function from low-rank pairs by network to the parameters of these networks with the pairs merged."""
    return lambda trained: {name: lora.merge(pipe.params[name], pairs) for name, pairs in trained.items()}
