"""Stable Diffusion XL: two text encoders and micro-conditioning on sizes (Podell et al. 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diffuse_jax.pipelines.families.clip import NEGATIVE, POSITIVE, ClipFamily, stack_branches
from diffuse_jax.pipelines.family import Call
from diffuse_jax.pipelines.method import Net, Params, Rows
from diffuse_jax.pipelines.options import XLOptions
from diffuse_jax.pipelines.parts.text import EncodeText

SIZES = ("original_size", "crops_coords_top_left", "target_size")


class PenultimateStates(EncodeText):
    """The hidden states before the last layer (or ``clip_skip`` layers earlier), without the final norm, concatenated
    over the encoders; the pooled embeddings are the last encoder's."""

    @property
    def adds(self) -> tuple[str, ...]:
        return "states", "pooled"

    def states(self, params: Params, net: Net, output: Any, clip_skip: int | None) -> jax.Array:
        return output.skipped(1 if clip_skip is None else clip_skip + 1)

    def pooled(self, outputs: list[Any]) -> jax.Array | None:
        return outputs[-1].text_embeds


Sizes = tuple[Any, Any, Any]
"""Original size, crop and target size, each (vertical, horizontal)."""


def negative_from_text(call: Call, positive: Sizes, scored: bool) -> Sizes:
    """Sizes of the unconditional branch in text to image: its own if both are given, else the conditional branch's."""
    if not {"negative_original_size", "negative_target_size"} <= call.options.keys():
        return positive
    crop = call.get("negative_crops_coords_top_left", (0, 0))
    return call.get("negative_original_size"), crop, call.get("negative_target_size")


def negative_from_image(call: Call, positive: Sizes, scored: bool) -> Sizes:
    """Sizes of the unconditional branch in image to image and inpainting: each defaults to the conditional branch's;
    the crop is separate only for checkpoints with an aesthetic score."""
    original, crop, target = positive
    crop = call.get("negative_crops_coords_top_left", (0, 0)) if scored else crop
    return call.get("negative_original_size", original), crop, call.get("negative_target_size", target)


@dataclasses.dataclass(frozen=True)
class MicroConditioning:
    """``time_ids``: the sizes and crop of each branch, or (for the refiner) original size, crop and aesthetic score.

    Attributes:
      negative: ``(call, positive sizes, scored)`` -> the sizes of the unconditional branch.
    """

    negative: Callable[[Call, Sizes, bool], Sizes]

    def __call__(self, pipe: Any, call: Call, branches: tuple[str, ...]) -> Rows:
        """The rows.

        Raises:
          ValueError: a size is not a pair of numbers, or a score is not a number.
        """
        for name in (prefix + size for prefix in (NEGATIVE, POSITIVE) for size in SIZES):
            if not are_numbers(call.get(name, (0, 0)), (2,)):
                raise ValueError(
                    f"sizes are (height, width) and crops (top, left) in pixels, got {name}={call.get(name)!r}"
                )
        scores = {NEGATIVE: call.get("negative_aesthetic_score", 2.5), POSITIVE: call.get("aesthetic_score", 6.0)}
        for branch, score in scores.items():
            if not are_numbers(score, ()):
                raise ValueError(f"{branch}aesthetic_score must be a number, got {score!r}")
        scored = bool(pipe.options.get("requires_aesthetics_score", False))
        defaults = {"original_size": call.size, "crops_coords_top_left": (0, 0), "target_size": call.size}
        original, crop, target = (call.get(name, value) for name, value in defaults.items())
        sizes = {POSITIVE: (original, crop, target)}
        sizes[NEGATIVE] = self.negative(call, sizes[POSITIVE], scored)
        last = lambda branch: (scores[branch],) if scored else sizes[branch][2]
        ids = {branch: [*sizes[branch][0], *sizes[branch][1], *last(branch)] for branch in branches}
        return {
            "time_ids": stack_branches([np.tile(np.array(ids[b], np.float32), (call.prompts, 1)) for b in branches])
        }


def are_numbers(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether a value is a finite number, or an array of finite numbers, of this shape."""
    return np.shape(value) == shape and np.asarray(value).dtype.kind in "iuf" and bool(np.isfinite(value).all())


def zero_negative(pipe: Any, call: Call) -> bool:
    """Whether the unconditional prompt embeddings are zeros."""
    return call.get("negative_prompt") is None and bool(pipe.options.get("force_zeros_for_empty_prompt", True))


STABLE_DIFFUSION_XL = ClipFamily(
    encoders={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
    encode=PenultimateStates,
    embeds={"states": "prompt_embeds", "pooled": "pooled_prompt_embeds"},
    conditioning=MicroConditioning(negative_from_text),
    zero_negative=zero_negative,
    options=XLOptions,
    plan_options=("denoising_end",),
)

STABLE_DIFFUSION_XL_FROM_IMAGE = dataclasses.replace(
    STABLE_DIFFUSION_XL, conditioning=MicroConditioning(negative_from_image)
)
"""SDXL for tasks that start from an image."""
