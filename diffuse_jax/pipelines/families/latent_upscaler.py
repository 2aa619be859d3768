"""Stable Diffusion's x2 latent upscaler: CLIP's states as its last layer leaves them, and its pooled state."""

from __future__ import annotations

from typing import Any

import jax

from diffuse_jax.pipelines.families.clip import ClipFamily
from diffuse_jax.pipelines.method import Net, Params
from diffuse_jax.pipelines.options import PooledTextOptions
from diffuse_jax.pipelines.parts.text import EncodeText


class UnnormalisedStates(EncodeText):
    """The hidden states after the last layer (or ``clip_skip`` layers earlier), without the final norm, and the pooled
    state."""

    @property
    def adds(self) -> tuple[str, ...]:
        return "states", "pooled"

    def states(self, params: Params, net: Net, output: Any, clip_skip: int | None) -> jax.Array:
        return output.skipped(clip_skip or 0)

    def pooled(self, outputs: list[Any]) -> jax.Array | None:
        return outputs[-1].pooled_output


LATENT_UPSCALER = ClipFamily(
    encoders={"text_encoder": "tokenizer"},
    encode=UnnormalisedStates,
    embeds={"states": "prompt_embeds", "pooled": "pooled_prompt_embeds"},
    distilled=False,
    options=PooledTextOptions,
)
