"""What Stable Diffusion's x2 latent upscaler has of its own: its preconditioning, and what its UNet takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.pipelines.method import Net, Params, Part, Rows, Step
from diffuse_jax.pipelines.parts.image import encode_image

SCALE = 2
LEVEL_WIDTH = 64
"""The noise level of the small image is embedded as so many cosines, then so many sines."""


@dataclasses.dataclass(frozen=True)
class Preconditioned(Part):
    """A network that predicts the clean sample through skip connections (Karras et al. 2022, table 1, column "EDM" with
    ``sigma_data`` 1); its timestep is ``log(sigma) / 4``. Output channels beyond the sample's are not used."""

    inner: Any

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        alpha, sigma = jnp.asarray(step.plan.levels)[step.i]
        norm = jnp.hypot(alpha, sigma)
        x = x / (jnp.asarray(step.plan.input_scale)[step.i] * norm)  # in coordinates in which its variance is one
        output = self.inner(params, rows, x, step._replace(t=jnp.log(sigma / alpha) / 4))
        return (alpha * x + sigma * output[..., : x.shape[-1]].astype(jnp.float32)) / norm


@dataclasses.dataclass(frozen=True)
class SmallImage(Part):
    """``small_image [B,2h,2w,c]``: the latents of the image to upscale, each repeated in a square; and
    ``timestep_cond [B,2 LEVEL_WIDTH + P]``, the embedding of no noise on it beside the row ``pooled``.

    Reads ``image [B,H,W,3]`` in [-1, 1], or ``image_latents [B,h,w,c]`` if it is already encoded.
    """

    vae: Net

    @property
    def reads(self) -> tuple[str, ...]:
        return "image|image_latents", "pooled"

    @property
    def adds(self) -> tuple[str, ...]:
        return "small_image", "timestep_cond"

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        latents = rows.get("image_latents")
        if latents is None:
            latents = encode_image(self.vae, params, rows["image"], keys, "small image", rows)
        return rows | {
            "small_image": latents.repeat(SCALE, axis=1).repeat(SCALE, axis=2),
            "timestep_cond": jax.tree.map(beside_no_noise, rows["pooled"]),
        }


def beside_no_noise(pooled: jax.Array) -> jax.Array:
    """``[..., P]`` -> ``[..., 2 LEVEL_WIDTH + P]``, after the embedding of a noise level of zero: cos 0 and sin 0."""
    one, zero = (jnp.full((*pooled.shape[:-1], LEVEL_WIDTH), value, pooled.dtype) for value in (1, 0))
    return jnp.concatenate([one, zero, pooled], -1)
