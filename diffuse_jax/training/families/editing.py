"""Training Stable Diffusion to edit images as a prompt instructs (Brooks et al. 2023)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffuse_jax.models import Params
from diffuse_jax.training.families.base import Arrays, Networks, apply, normalised
from diffuse_jax.training.families.stable_diffusion import LatentFamily


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditingFamily(LatentFamily):
    """Pipelines whose UNet also reads the latents of the image before the edit, ``conditioning [B,H,W,3]`` uint8."""

    encoded_images: tuple[str, ...] = ("moments", "image_condition")
    encodes_conditioning: bool = True

    def encode_images(self, models: Networks, params: Params, batch: Arrays) -> dict[str, jax.Array]:
        """``moments [B,h,w,2c]``, and ``image_condition [B,h,w,c]``, the most likely latents, which are not scaled."""
        posterior = apply(models, params, "vae", normalised(batch["conditioning"]), method="encode")
        return super().encode_images(models, params, batch) | {"image_condition": posterior.mode()}

    def predict(self, models: Networks, params: Params, batch: Arrays, x: jax.Array, t: jax.Array) -> jax.Array:
        """Where ``keeps_conditioning [B]`` is False, the latents of the image before the edit are zero."""
        found = jnp.asarray(batch["image_condition"], jnp.float32)
        if "keeps_conditioning" in batch:
            found = jnp.where(batch["keeps_conditioning"][:, None, None, None], found, 0.0)
        control = {name: array for name, array in batch.items() if name != "conditioning"}
        return super().predict(models, params, control, jnp.concatenate([x, found], -1), t)
