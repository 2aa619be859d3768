"""Images and masks as conditioning: encoded once, before the loop."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffuse_jax.models.autoencoder_kl import scale_latents
from diffuse_jax.pipelines.method import Net, Params, Part, Rows, draw, keys_for, noise_row
from diffuse_jax.pipelines.parts.guidance import Branches, count_branches
from diffuse_jax.schedulers.noising import noised


def encode_image(
    vae: Net, params: Params, images: jax.Array, keys: jax.Array, purpose: str, rows: Rows | None = None
) -> jax.Array:
    """Encode images ``[B,H,W,3]`` in [-1, 1] as scaled latents ``[B,h,w,c]`` float32, sampled from the posterior.

    Args:
      vae: the autoencoder.
      params: parameters of the networks.
      images: the images.
      keys: random keys ``[B]``, one per image.
      purpose: distinguishes this noise from that of other encoded images; see :func:`~diffuse_jax.pipelines.draw`.
      rows: of the request; the noise for this purpose is taken from them where they have it.
    """
    posterior = vae.apply(params, images, method="encode")
    given = (rows or {}).get(noise_row(purpose))
    latents = posterior.sample(keys_for(keys, purpose)) if given is None else posterior.at(given)
    return scale_latents(latents, vae.config)


@dataclasses.dataclass(frozen=True)
class ImageCondition(Part):
    """``image_condition [B,h,w,c]``: the encoded image as a UNet's further input (InstructPix2Pix), without noise.

    Reads ``image [B,H,W,3]`` in [-1, 1], or ``image_latents`` if it is already encoded. With guidance it is zero in the
    first branch.

    Attributes:
      vae: the autoencoder.
      scaled: multiply the latents by the autoencoder's scaling factor.
    """

    vae: Net
    scaled: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        return ("image|image_latents",)

    @property
    def adds(self) -> tuple[str, ...]:
        return ("image_condition",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        latents = rows.get("image_latents")
        if latents is None:
            latents = self.vae.apply(params, rows["image"], method="encode").mode().astype(jnp.float32)
            latents = scale_latents(latents, self.vae.config) if self.scaled else latents
        count = count_branches(rows)
        if count > 1:
            latents = Branches(jnp.stack([jnp.zeros_like(latents), *[latents] * (count - 1)], 1))
        return rows | {"image_condition": latents}


@dataclasses.dataclass(frozen=True)
class NoisedImage(Part):
    """``noised_image [B,h,w,3]``: ``low_res_image`` noised to its level ``low_res_level [B,2]`` (alpha, sigma), as an
    upscaler takes it.

    Attributes:
      purpose: distinguishes this noise; see :func:`~diffuse_jax.pipelines.draw`.
    """

    purpose: str = "low res image"

    @property
    def reads(self) -> tuple[str, ...]:
        return "low_res_image", "low_res_level"

    @property
    def adds(self) -> tuple[str, ...]:
        return ("noised_image",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        image = rows["low_res_image"]
        given = rows.get(noise_row(self.purpose))
        noise = draw(keys, self.purpose, image.shape[1:]) if given is None else given
        return rows | {"noised_image": noised(rows["low_res_level"], image, noise)}


@dataclasses.dataclass(frozen=True)
class LatentMask(Part):
    """``latent_mask [B,h,w,1]`` from ``mask [B,H,W,1]``: the first pixel of each square of ``scale`` x ``scale``."""

    scale: int

    @property
    def reads(self) -> tuple[str, ...]:
        return ("mask",)

    @property
    def adds(self) -> tuple[str, ...]:
        return ("latent_mask",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        return rows | {"latent_mask": rows["mask"][:, :: self.scale, :: self.scale]}


@dataclasses.dataclass(frozen=True)
class EncodeMaskedImage(Part):
    """``masked_image_latents [B,h,w,c]``: the image made grey where ``mask`` is set, then encoded."""

    vae: Net

    @property
    def reads(self) -> tuple[str, ...]:
        return ("mask", "image|masked_image_latents")

    @property
    def adds(self) -> tuple[str, ...]:
        return ("masked_image_latents",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        if "masked_image_latents" in rows:
            return rows
        masked = rows["image"] * (rows["mask"] < 0.5)
        return rows | {"masked_image_latents": encode_image(self.vae, params, masked, keys, "masked image", rows)}
