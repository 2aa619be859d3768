"""Stable Diffusion XL: two text encoders and micro-conditioning on sizes (Podell et al. 2023)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.pipelines.families.clip import NEGATIVE, POSITIVE, ClipFamily, joined
from diffuse_jax.pipelines.family import Call
from diffuse_jax.pipelines.method import Params, Rows
from diffuse_jax.pipelines.options import XLOptions
from diffuse_jax.pipelines.parts.text import EncodeText

SIZES = ("original_size", "crops_coords_top_left", "target_size")


class PenultimateStates(EncodeText):
    """The hidden states before the last layer (or ``clip_skip`` layers earlier), not normalised, concatenated over the
    encoders; the pooled embeddings are the last encoder's."""

    @property
    def adds(self) -> tuple[str, ...]:
        return "states", "pooled"

    def states(self, params: Params, outputs: list[Any], clip_skip: int | None) -> dict[str, jax.Array]:
        states = [out.skipped(1 if clip_skip is None else clip_skip + 1) for out in outputs]
        return {"states": jnp.concatenate(states, -1), "pooled": outputs[-1].text_embeds}


def micro_conditioning(pipe: Any, call: Call, branches: tuple[str, ...]) -> Rows:
    """``time_ids``: the sizes, crop and aesthetic score of each branch, as far as the checkpoint takes them.

    Raises:
      ValueError: a size is not a pair.
    """
    for name in (prefix + size for prefix in (NEGATIVE, POSITIVE) for size in SIZES):
        if np.shape(call.get(name, (0, 0))) != (2,):
            raise ValueError(
                f"sizes are (height, width) and crops (top, left) in pixels, got {name}={call.get(name)!r}"
            )
    scored = bool(pipe.options.get("requires_aesthetics_score", False))
    original, target = call.get("original_size", call.size), call.get("target_size", call.size)
    crop, score = call.get("crops_coords_top_left", (0, 0)), call.get("aesthetic_score", 6.0)
    values = {NEGATIVE: (original, crop, target), POSITIVE: (original, crop, target)}
    if {"negative_original_size", "negative_target_size"} <= call.options.keys():
        negative_crop = call.get("negative_crops_coords_top_left", (0, 0))
        values[NEGATIVE] = call.get("negative_original_size"), negative_crop, call.get("negative_target_size")
    scores = {NEGATIVE: call.get("negative_aesthetic_score", 2.5), POSITIVE: score}
    ids = {
        branch: [*sizes[0], *sizes[1], *((scores[branch],) if scored else sizes[2])] for branch, sizes in values.items()
    }
    return {"time_ids": joined([np.tile(np.array(ids[b], np.float32), (call.prompts, 1)) for b in branches])}


def zeroed(pipe: Any, call: Call) -> bool:
    """Whether the unconditional prompt embeddings are zeros."""
    return call.get("negative_prompt") is None and bool(pipe.options.get("force_zeros_for_empty_prompt", True))


STABLE_DIFFUSION_XL = ClipFamily(
    encoders={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
    encode=PenultimateStates,
    embeds={"states": "prompt_embeds", "pooled": "pooled_prompt_embeds"},
    conditioning=micro_conditioning,
    zeroed=zeroed,
    options=XLOptions,
    plan_options=("denoising_end",),
)
