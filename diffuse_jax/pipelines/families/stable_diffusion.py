"""Stable Diffusion 1.x and 2.x: one CLIP text encoder (Rombach et al. 2022)."""

from __future__ import annotations

from typing import Any

import jax

from diffuse_jax.pipelines.families.clip import ClipFamily
from diffuse_jax.pipelines.method import Net, Params
from diffuse_jax.pipelines.parts.text import EncodeText


class LastStates(EncodeText):
    """The encoder's normalised last hidden states, or with ``clip_skip`` the normalised states of an earlier layer."""

    def states(self, params: Params, net: Net, output: Any, clip_skip: int | None) -> jax.Array:
        if clip_skip is None:
            return output.last_hidden_state
        return net.apply(params, output.skipped(clip_skip), method="final_norm")


STABLE_DIFFUSION = ClipFamily(
    encoders={"text_encoder": "tokenizer"},
    encode=LastStates,
    embeds={"states": "prompt_embeds"},
    masked=True,
)
