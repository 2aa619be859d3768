"""Training Stable Diffusion to inpaint: its UNet also reads a mask and the latents of the image around it.

Source: the inpainting models of Rombach et al. 2022 (arXiv 2112.10752), section 4.5.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.models import Params
from diffuse_jax.models.autoencoder_kl import scale_latents
from diffuse_jax.training.families.base import Arrays, Networks, apply, normalised
from diffuse_jax.training.families.stable_diffusion import OF_LATENTS, LatentFamily

NO_PROMPT_ALONE = "it repaints images; open a checkpoint with its inpainting pipeline, an image and a mask"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InpaintingFamily(LatentFamily):
    """Checkpoints for inpainting, whose UNet takes twice as many channels as there are latents, and one more.

    Every image of every step gets a mask of its own, see :func:`random_masks`.
    """

    methods: tuple[str, ...] = ("text to image", "DreamBooth")
    refused: Any = dataclasses.field(
        default_factory=lambda: {
            **OF_LATENTS,
            "cache_latents": "masks differ from step to step, and with them the latents of what they leave",
            "validation_prompt": NO_PROMPT_ALONE,
        }
    )

    def draws(self, pipe: Any) -> bool:
        return False

    def begin(self, models: Networks, params: Params, batch: Arrays, key: jax.Array) -> tuple[jax.Array, Arrays]:
        """Scaled latents ``[B,h,w,c]``; also ``beside [B,h,w,1+c]``, the mask and the latents of the image around
        it."""
        k_latents, k_mask, k_around = jax.random.split(key, 3)
        x0, batch = super().begin(models, params, batch, k_latents)
        pixels, config = normalised(batch["pixel_values"]), models["vae"].config
        count, height, width = pixels.shape[:3]
        mask = random_masks(k_mask, count, height, width)
        around = apply(models, params, "vae", pixels * (1 - mask), method="encode").sample(k_around)
        small = mask[:, :: config.scale, :: config.scale]
        beside = jnp.concatenate([small, scale_latents(around.astype(jnp.float32), config)], -1)
        return x0, {**batch, "beside": beside}

    def predict(self, models: Networks, params: Params, batch: Arrays, x: jax.Array, t: jax.Array) -> jax.Array:
        return super().predict(models, params, batch, jnp.concatenate([x, batch["beside"]], -1), t)


def random_masks(key: jax.Array, count: int, height: int, width: int) -> jax.Array:
    """Rectangles and ellipses, float32 ``[count,height,width,1]``, 1 inside.

    Their heights and widths are uniform between 0 and those of the image, in which they lie.
    """
    k_size, k_place, k_round = jax.random.split(key, 3)
    size = jax.random.uniform(k_size, (count, 2), jnp.float32)
    centre = size / 2 + (1 - size) * jax.random.uniform(k_place, (count, 2), jnp.float32)
    ellipse = jax.random.bernoulli(k_round, shape=(count, 1, 1))

    def distance(pixels: int, axis: int) -> jax.Array:
        """Of the middles of pixels from the centre, 1 at the border, ``[count,pixels]``."""
        middles = (jnp.arange(pixels) + 0.5) / pixels
        return jnp.abs(middles[None] - centre[:, axis, None]) / jnp.maximum(size[:, axis, None] / 2, 1e-6)

    down, right = distance(height, 0)[:, :, None], distance(width, 1)[:, None]
    inside = jnp.where(ellipse, jnp.square(down) + jnp.square(right), jnp.maximum(down, right)) <= 1
    return inside[..., None].astype(jnp.float32)
