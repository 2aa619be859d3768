"""The parts of decoders between image embeddings and the latents of a MoVQ (Kandinsky; Razzhigaev et al. 2023)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.pipelines.method import Net, Params, Part, Rows, Step


@dataclasses.dataclass(frozen=True)
class Unquantised(Net):
    """A vector-quantised autoencoder whose latents are neither quantised nor scaled."""

    @property
    def config(self) -> Any:
        return self.model.config.replace(scaling_factor=1.0)

    def apply(self, params: Params, *args: Any, **options: Any) -> Any:
        if options.get("method") == "decode":
            options["force_not_quantize"] = True
        return super().apply(params, *args, **options)


@dataclasses.dataclass(frozen=True)
class EmbeddingUNet(Part):
    """A UNet that is conditioned on ``image_embeds [B,E]``, and on ``hint [B,H,W,3]`` in [0, 1] if it takes one."""

    net: Net

    @property
    def reads(self) -> tuple[str, ...]:
        return ("image_embeds", *(("hint",) if self.net.config.addition_embed_type == "image_hint" else ()))

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        return self.net.apply(params, x, step.t, None, {name: rows[name] for name in self.reads})


@dataclasses.dataclass(frozen=True)
class PromptedUNet(EmbeddingUNet):
    """A UNet that is conditioned on ``image_embeds [B,E]`` and a prompt: ``states [B,L,D]`` and ``pooled [B,P]``."""

    @property
    def reads(self) -> tuple[str, ...]:
        return "image_embeds", "states", "pooled"

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        added = {"text_embeds": rows["pooled"], "image_embeds": rows["image_embeds"]}
        return self.net.apply(params, x, step.t, rows["states"], added)


@dataclasses.dataclass(frozen=True)
class EncodeInitial(Part):
    """``image_latents [B,h,w,c]`` of ``initial_image [B,H,W,3]`` in [-1, 1], without randomness."""

    movq: Net

    @property
    def reads(self) -> tuple[str, ...]:
        return ("initial_image",)

    @property
    def adds(self) -> tuple[str, ...]:
        return ("image_latents",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        latents = self.movq.apply(params, rows["initial_image"], method="encode").mode()
        return rows | {"image_latents": latents.astype(jnp.float32)}


@dataclasses.dataclass(frozen=True)
class WidenedMask(Part):
    """The mask of an inpainting decoder, one latent pixel wider than ``mask [B,H,W,1]``.

    Adds ``latent_mask [B,h,w,1]``, 1 where to repaint; ``known_mask``, 1 where not; and ``masked_image_latents``, which
    are zero where to repaint.
    """

    scale: int

    @property
    def reads(self) -> tuple[str, ...]:
        return "mask", "image_latents"

    @property
    def adds(self) -> tuple[str, ...]:
        return "latent_mask", "known_mask", "masked_image_latents"

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        mask = widened(rows["mask"][:, :: self.scale, :: self.scale])
        known = 1 - mask
        masked = rows["image_latents"] * known
        return rows | {"latent_mask": mask, "known_mask": known, "masked_image_latents": masked}


def widened(mask: jax.Array) -> jax.Array:
    """A mask ``[B,h,w,1]`` with the neighbours of its pixels along rows, columns and the main diagonal.

    The other diagonal is left out, as in the training of the published checkpoints.
    """
    _, height, width, _ = mask.shape
    padded = jnp.pad(mask, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [(0, 0), (1, 0), (0, 1), (1, 1), (-1, 0), (0, -1), (-1, -1)]
    moved = [padded[:, 1 + y : 1 + y + height, 1 + x : 1 + x + width] for y, x in shifts]
    return jnp.stack(moved).max(0)
