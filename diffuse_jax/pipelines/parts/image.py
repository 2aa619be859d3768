"""Images and masks as conditioning: encoded once, before the loop."""

from __future__ import annotations

import dataclasses

import jax

from diffuse_jax.models.autoencoder_kl import scale_latents
from diffuse_jax.pipelines.method import Net, Params, Part, Rows, keys_for, noise_row


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
