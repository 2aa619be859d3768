"""The parts of an unCLIP prior (Ramesh et al. 2022, 2.2): a run that denoises CLIP image embeddings.

The sample of an image is one embedding ``[D]``, or two, ``[D,2]``: that of the prompt and that of the negative prompt.
Where there are two, rows of tokens are ``[B,2,L]``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.pipelines.method import Net, Params, Part, Rows, Step
from diffuse_jax.pipelines.parts.guidance import Branches, is_branches


@dataclasses.dataclass(frozen=True)
class EncodePriorText(Part):
    """The prompts' projected embeddings and hidden states: from ``ids`` to ``pooled [B,E]`` and ``states [B,L,E]``."""

    net: Net

    @property
    def reads(self) -> tuple[str, ...]:
        return ("ids",)

    @property
    def adds(self) -> tuple[str, ...]:
        return "pooled", "states"

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        ids = rows["ids"][self.net.name]
        tokens = ids.values if is_branches(ids) else ids
        out = self.net.apply(params, tokens.reshape(-1, tokens.shape[-1]))
        like = lambda x: x.reshape(*tokens.shape[:-1], *x.shape[1:])
        found = {"pooled": like(out.text_embeds), "states": like(out.last_hidden_state)}
        return rows | {name: Branches(x) if is_branches(ids) else x for name, x in found.items()}


@dataclasses.dataclass(frozen=True)
class GivenText(EncodePriorText):
    """The same for prompts whose ``given_pooled [B,E]`` and ``given_states [B,L,E]`` are known: with guidance, ``ids``
    are those of the branch without a prompt, which alone is encoded."""

    @property
    def reads(self) -> tuple[str, ...]:
        return "given_pooled", "given_states"

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        given = {name: rows[f"given_{name}"].astype(self.net.model.dtype) for name in self.adds}
        if "ids" not in rows:
            return rows | given
        without = super().prepare(params, rows, keys)
        return rows | {name: Branches(jnp.stack([without[name], value], 1)) for name, value in given.items()}


@dataclasses.dataclass(frozen=True)
class Prior(Part):
    """A prior as a denoiser.

    Reads ``pooled``, ``states`` and ``attention_mask`` (by encoder), which is true where a token may be attended to.
    """

    net: Net
    encoder: str = "text_encoder"

    @property
    def reads(self) -> tuple[str, ...]:
        return "pooled", "states", "attention_mask"

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        each = x[:, None] if x.ndim == 2 else jnp.moveaxis(x, -1, 1)
        flat = lambda y, rank: y.reshape(-1, *y.shape[-rank:])
        mask = rows["attention_mask"][self.encoder]
        given = (flat(each, 1), step.t, flat(rows["pooled"], 1), flat(rows["states"], 2), flat(mask, 1))
        output = self.net.apply(params, *given).reshape(each.shape)
        return output[:, 0] if x.ndim == 2 else jnp.moveaxis(output, 1, -1)


def embedded(part: ImageEmbedding, params: Params, rows: Rows) -> jax.Array:
    """The embeddings ``[B,E]`` of ``image_pixels [B,h,w,3]``, outside a run or in it."""
    return part.net.apply(params, rows["image_pixels"]).image_embeds.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class ImageEmbedding(Part):
    """``image_latents``, the start of a run from an image: its embedding, which is the same for both samples.

    Reads ``image_pixels [B,h,w,3]`` as the encoder takes them, or ``image_embeds [B,E]``.
    """

    net: Net

    @property
    def reads(self) -> tuple[str, ...]:
        return "image_pixels|image_embeds", "noise"

    @property
    def adds(self) -> tuple[str, ...]:
        return ("image_latents",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        embeds = rows["image_embeds"] if "image_embeds" in rows else embedded(self, params, rows)
        several = embeds if rows["noise"].ndim == 2 else jnp.stack([embeds] * rows["noise"].shape[-1], -1)
        return rows | {"image_latents": several}


@dataclasses.dataclass(frozen=True)
class EmbedImage(Part):
    """``image_embeds [B,E]`` of ``image_pixels [B,h,w,3]``, as the encoder takes them."""

    net: Net

    @property
    def reads(self) -> tuple[str, ...]:
        return ("image_pixels",)

    @property
    def adds(self) -> tuple[str, ...]:
        return ("image_embeds",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        return rows | {"image_embeds": self.net.apply(params, rows["image_pixels"]).image_embeds.astype(jnp.float32)}


@dataclasses.dataclass(frozen=True)
class ToEmbedding(Part):
    """``image_embeds``, float32 ``[B,E]``."""

    prior: Net

    def __call__(self, params: Params, rows: Rows, sample: jax.Array) -> dict[str, Any]:
        return {"image_embeds": self.prior.apply(params, sample, method="unnormalised")}


@dataclasses.dataclass(frozen=True)
class ToEmbeddings(Part):
    """``image_embeds`` and ``negative_image_embeds``, both float32 ``[B,E]``.

    Without an embedding of a negative prompt, the negative one is that of an image whose pixel values are 0.
    """

    prior: Net
    encoder: Net

    def __call__(self, params: Params, rows: Rows, sample: jax.Array) -> dict[str, Any]:
        plain = lambda x: self.prior.apply(params, x, method="unnormalised")
        if sample.ndim == 3:
            return {"image_embeds": plain(sample[..., 0]), "negative_image_embeds": plain(sample[..., 1])}
        c = self.encoder.config
        pixels = jnp.zeros((1, c.image_size, c.image_size, c.num_channels), jnp.float32)
        negative = self.encoder.apply(params, pixels).image_embeds.astype(jnp.float32)
        return {"image_embeds": plain(sample), "negative_image_embeds": jnp.repeat(negative, len(sample), axis=0)}
