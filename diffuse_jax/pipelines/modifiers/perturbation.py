"""Guidance away from the prediction of a perturbed network or for a degraded sample."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffuse_jax.pipelines.inputs import one_per_image
from diffuse_jax.pipelines.method import all_parts
from diffuse_jax.pipelines.modifiers.request import (
    Number,
    changed,
    numbers,
    require_layers,
    with_guidance,
    with_network,
)
from diffuse_jax.pipelines.parts import features
from diffuse_jax.pipelines.parts.guidance import ClassifierFree
from diffuse_jax.pipelines.parts.self_attention import AttentionMap, SelfAttention
from diffuse_jax.pipelines.running import Request
from diffuse_jax.weights.names import flatten


@dataclasses.dataclass(frozen=True)
class PerturbedAttention:
    """Perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377): away from the prediction of the network with
    self-attention replaced by the identity. Works without a guidance scale too.

    Attributes:
      scale: strength.
      layers: names of modules, with dots as in PyTorch: "mid_block", "up_blocks.0.attentions.1"; "down", "mid" and
        "up" name all of that kind; or a regular expression that is found in names: "attentions.(0|1)". Their
        self-attentions are replaced.
      adaptive: how much of the scale each timestep below 1000 takes away.
    """

    scale: Number = 3.0
    layers: str | Sequence[str] = "mid"
    adaptive: Number = 0.0

    def __call__(self, request: Request, pipe: Any) -> Request:
        layers = self_attentions(pipe, [self.layers] if isinstance(self.layers, str) else self.layers)
        count = [0]

        def guided(guidance: ClassifierFree) -> ClassifierFree:
            count[0] = len(guidance.perturbed) + 1
            if count[0] > 1:
                raise ValueError("PerturbedAttention is given twice; name all layers in one")
            return replace(guidance, perturbed=(features.AwayFrom(),))

        wrap = lambda network: features.PerturbedAttention(network, layers, count[0])
        rows = {"pag": numbers(request, self.scale, self.adaptive, name="PerturbedAttention")}
        return changed(request, rows, lambda d: with_network(with_guidance(d, guided), wrap))


def self_attentions(pipe: Any, names: Sequence[str]) -> tuple[str, ...]:
    """The paths of the UNet's self-attentions inside the modules of these names, or matching an expression.

    Raises:
      ValueError: a name matches none, or is neither a name nor an expression.
    """
    require_layers(pipe.components["unet"])
    every = sorted({"/".join(path[:-2]) for path in flatten(pipe.params["unet"]) if "attn1" in path})
    kinds = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
    found: list[str] = []
    for name in names:
        words = kinds.get(name, name).split(".")
        fits = [path for path in every if dotted(path)[: len(words)] == words]
        try:
            fits = fits or [path for path in every if re.search(name, ".".join(dotted(path)))]
        except re.error as error:
            raise ValueError(f"{name!r} is neither the name of a layer nor a regular expression: {error}") from None
        if not fits:
            known = ", ".join(".".join(dotted(path)) for path in every)
            raise ValueError(f"the UNet has no self-attention in {name!r}; it has {known}")
        found += fits
    return tuple(dict.fromkeys(found))


def dotted(path: str) -> list[str]:
    """One of our paths as PyTorch writes it: "up_blocks_0/attentions_1" is up_blocks, 0, attentions, 1."""
    words: list[str] = []
    for name in path.split("/"):
        head, _, number = name.rpartition("_")
        words += [head, number] if number.isdigit() else [name]
    return words


@dataclasses.dataclass(frozen=True)
class SelfAttentionGuidance:
    """Self-attention guidance; see :class:`~diffuse_jax.pipelines.parts.self_attention.SelfAttention`.

    Attributes:
      scale: strength.
    """

    scale: Number = 0.75

    def __call__(self, request: Request, pipe: Any) -> Request:
        self_attentions(pipe, ["mid"])
        if any(isinstance(part, SelfAttention) for part in all_parts(request.method.denoiser)):
            raise ValueError("SelfAttentionGuidance is given twice; give one, with the sum of the scales")
        patch = 2 ** (len(pipe.components["unet"].config.block_out_channels) - 1)
        rows = {"sag_scale": one_per_image(self.scale, request.images, "SelfAttentionGuidance")}
        guided = lambda d: with_guidance(d, lambda g: SelfAttention(g, patch))
        return changed(request, rows, lambda d: with_network(guided(d), AttentionMap))
