"""The parts of an unCLIP decoder and of its super-resolution (Ramesh et al. 2022, 2.1)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.models.resampling import bicubic_antialiased
from diffuse_jax.pipelines.method import Net, Params, Part, Rows, Step
from diffuse_jax.pipelines.parts.guidance import count_branches, is_branches, stacked, unstacked


@dataclasses.dataclass(frozen=True)
class DecoderContext(Part):
    """What the decoder's UNet reads: ``states [B,T+L,D]`` of image and prompt, their ``text_mask [B,T+L]``, and
    ``class_labels [B,C]``; in a branch that is not conditional the image is a learned one.

    Reads ``image_embeds [B,E]``, and of the prompt ``pooled``, ``states`` and ``attention_mask`` (by encoder).
    """

    net: Net
    encoder: str

    @property
    def reads(self) -> tuple[str, ...]:
        return "image_embeds", "pooled", "states", "attention_mask"

    @property
    def adds(self) -> tuple[str, ...]:
        return "text_mask", "class_labels"

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        pooled, states, mask = (
            stacked(x) for x in (rows["pooled"], rows["states"], rows["attention_mask"][self.encoder])
        )
        count, images = count_branches(rows["pooled"]), len(rows["image_embeds"])
        embeds = jnp.concatenate([rows["image_embeds"]] * count)
        unconditional = jnp.arange(count * images) < (count - 1) * images
        context, vector = self.net.apply(params, embeds, pooled, states, unconditional)
        image = jnp.ones((len(mask), self.net.config.clip_extra_context_tokens), bool)
        found = {"states": context, "class_labels": vector, "text_mask": jnp.concatenate([image, mask.astype(bool)], 1)}
        branched = is_branches(rows["pooled"])
        return rows | {name: unstacked(x, count) if branched else x for name, x in found.items()}


@dataclasses.dataclass(frozen=True)
class ToSmallImage(Part):
    """``small_image [B,h,w,C]`` in [-1, 1], clipped."""

    def __call__(self, params: Params, rows: Rows, sample: jax.Array) -> dict[str, Any]:
        return {"small_image": jnp.clip(sample.astype(jnp.float32), -1.0, 1.0)}


@dataclasses.dataclass(frozen=True)
class Enlarged(Part):
    """``enlarged_image [B,*size,C]`` of ``small_image [B,h,w,C]``, by cubic interpolation."""

    size: tuple[int, int]

    @property
    def reads(self) -> tuple[str, ...]:
        return ("small_image",)

    @property
    def adds(self) -> tuple[str, ...]:
        return ("enlarged_image",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        return rows | {"enlarged_image": bicubic_antialiased(rows["small_image"], self.size, align_corners=False)}


@dataclasses.dataclass(frozen=True)
class WithLast(Part):
    """A denoiser, with another one in the last evaluation."""

    first: Any
    last: Any

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        is_last = step.i + 1 == step.plan.num_evaluations
        of = lambda denoiser: lambda: denoiser(params, rows, x, step)
        return jax.lax.cond(is_last, of(self.last), of(self.first))
