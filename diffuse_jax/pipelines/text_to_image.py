"""Text to image as one pure program: token ids in, pixels out (see :mod:`diffuse_jax.pipelines.sampling`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffuse_jax.models.autoencoder_kl import AutoencoderKL
from diffuse_jax.models.base import Params
from diffuse_jax.models.unet_2d_condition import UNet2DConditionModel
from diffuse_jax.pipelines import denoise as verbs
from diffuse_jax.pipelines.sampling import Draws, Rows, first_noise
from diffuse_jax.schedulers.plan import Plan, State
from diffuse_jax.text.clip import CLIPTextModel


class Text(NamedTuple):
    """Encoded prompts: ``states [B,L,D]`` and, for SDXL, ``pooled [B,P]``."""

    states: Rows
    pooled: Rows | None = None


class Prompts(NamedTuple):
    """Prompts as the program takes them: token ids by encoder, each ``[B,L]``, or text that is already encoded."""

    ids: dict[str, Rows] | None = None
    text: Text | None = None
    time_ids: Rows | None = None  # [B,6] sizes and crop of SDXL, [B,5] in the refiner
    weight: Rows | None = None  # [B], 0 replaces the encoded text by zeros (SDXL without a negative prompt)


class Batch(NamedTuple):
    """A batch of requests; the first axis of every array is the picture."""

    prompt: Prompts
    negative: Prompts | None  # None where no guidance is wanted
    guidance_scale: Rows  # [B]
    guidance_rescale: Rows  # [B]
    draws: Draws


class Prepared(NamedTuple):
    """What the loop needs beside the state: both prompts encoded (negative first) and a key for each picture."""

    text: Text
    time_ids: jax.Array | None
    keys: jax.Array


@dataclasses.dataclass(frozen=True)
class TextToImage:
    """The static half of a request: networks and choices that change the program."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: tuple[tuple[str, CLIPTextModel], ...]
    encode: Callable[..., Text]  # (encoders, params, ids, clip_skip) -> Text
    height: int
    width: int
    output: str = "uint8"  # or "float" (pictures in [0, 1]) or "latent"
    clip_skip: int | None = None
    tile: int | None = None
    slices: bool = False

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        scale = self.vae.config.scale
        return self.height // scale, self.width // scale, self.vae.config.latent_channels

    def start(self, params: dict[str, Params], batch: Batch, plan: Plan) -> tuple[Prepared, State]:
        """Encode the prompts and draw the first latents."""
        prompts = [encode(self, params, p, skip) for p, skip in prompts_of(self, batch)]
        text, time_ids = jax.tree.map(lambda *rows: jnp.concatenate(rows), *prompts)
        noise, keys = first_noise(batch.draws, self.latent_shape)
        return Prepared(text, time_ids, keys), plan.init(noise)

    def denoiser(self, params: dict[str, Params], batch: Batch, prepared: Prepared) -> verbs.Denoiser:
        """The UNet with its conditions, guided where there is a negative prompt."""
        added = None
        if prepared.time_ids is not None:
            added = {"text_embeds": prepared.text.pooled, "time_ids": prepared.time_ids}
        dim = self.unet.config.time_cond_proj_dim
        cond = None if dim is None else verbs.guidance_embedding(batch.guidance_scale, dim)

        def unet(x: jax.Array, t: jax.Array) -> jax.Array:
            return self.unet.apply({"params": params["unet"]}, x, t, prepared.text.states, added, timestep_cond=cond)

        return unet if batch.negative is None else verbs.guided(unet, batch.guidance_scale, batch.guidance_rescale)

    def finish(self, params: dict[str, Params], state: State) -> jax.Array:
        """Latents to what the caller asked for."""
        if self.output == "latent":
            return state.sample
        images = verbs.decode_latents(self.vae, params["vae"], state.sample, tile=self.tile, slices=self.slices)
        return verbs.to_uint8(images) if self.output == "uint8" else images


def prompts_of(task: TextToImage, batch: Batch) -> list[tuple[Prompts, int | None]]:
    """The prompts in the order of the doubled batch. ``clip_skip`` is for the positive ones only, as in diffusers."""
    negative = [] if batch.negative is None else [(batch.negative, None)]
    return [*negative, (batch.prompt, task.clip_skip)]


def encode(
    task: TextToImage, params: dict[str, Params], prompts: Prompts, clip_skip: int | None
) -> tuple[Text, jax.Array | None]:
    """Token ids to text states, unless they came encoded."""
    text = prompts.text
    if text is None:
        assert prompts.ids is not None
        text = task.encode(task.text_encoders, params, prompts.ids, clip_skip)
    if prompts.weight is not None:
        weight = prompts.weight
        text = jax.tree.map(lambda x: x * verbs.per_sample(weight, x).astype(x.dtype), text)
    return text, prompts.time_ids
