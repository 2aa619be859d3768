"""Text to image on PyTorch, verb by verb the twin of :mod:`diffuse_jax.pipelines.text_to_image`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch

from diffuse_jax.pipelines import denoise as verbs
from diffuse_jax.pipelines import stable_diffusion, stable_diffusion_xl
from diffuse_jax.pipelines.sampling import first_noise
from diffuse_jax.pipelines.text_to_image import Batch, Prompts, TextToImage, prompts_of
from diffuse_jax.schedulers.plan import Plan
from diffuse_jax.torch_backend.networks import channels_first, channels_last, to_torch
from diffuse_jax.torch_backend.plan import State, first_state

Modules = Mapping[str, Any]
"""Component name -> ``torch.nn.Module``."""


class Text(NamedTuple):
    """Encoded prompts: ``states [B,L,D]`` and, for SDXL, ``pooled [B,P]``."""

    states: torch.Tensor
    pooled: torch.Tensor | None = None


class Prepared(NamedTuple):
    """What the loop needs beside the state: both prompts encoded (negative first) and a JAX key for each picture."""

    text: Text
    time_ids: torch.Tensor | None
    keys: jax.Array


@dataclasses.dataclass(frozen=True)
class TorchTextToImage:
    """The twin of a text-to-image task."""

    task: TextToImage

    def __post_init__(self) -> None:
        if self.task.tile is not None:
            raise ValueError("the PyTorch side decodes pictures in one piece; use a pipeline with vae_tiling=None")

    def start(self, modules: Modules, batch: Batch, plan: Plan) -> tuple[Prepared, State]:
        """Encode the prompts and take over the first latents, which JAX draws."""
        prompts = [self.encode(modules, p, skip) for p, skip in prompts_of(self.task, batch)]
        states, pooled, time_ids = (joined(column) for column in zip(*prompts, strict=True))
        noise, keys = first_noise(batch.draws, self.task.latent_shape)
        return Prepared(Text(states, pooled), time_ids, keys), first_state(plan, to_torch(noise, device_of(modules)))

    def encode(self, modules: Modules, prompts: Prompts, clip_skip: int | None) -> tuple[Any, Any, Any]:
        """States, pooled states and size conditions; text that came encoded is taken as it is."""
        device = device_of(modules)
        tensor = lambda x: None if x is None else to_torch(x, device)
        if prompts.text is not None:
            text = Text(tensor(prompts.text.states), tensor(prompts.text.pooled))
        else:
            assert prompts.ids is not None
            names = [name for name, _ in self.task.text_encoders]
            ids = [to_torch(prompts.ids[name], device).long() for name in names]
            text = ENCODE[self.task.encode]([modules[name] for name in names], ids, clip_skip)
        if prompts.weight is not None:
            weight = tensor(prompts.weight)
            text = Text(*(None if x is None else x * per_sample(weight, x).to(x.dtype) for x in text))
        return text.states, text.pooled, tensor(prompts.time_ids)

    def denoiser(self, modules: Modules, batch: Batch, prepared: Prepared) -> Callable[[torch.Tensor, float], Any]:
        """``(x [B,h,w,c], timestep) -> output``: the UNet, guided where there is a negative prompt."""
        unet, tensor = modules["unet"], lambda x: to_torch(x, device_of(modules))
        dim = self.task.unet.config.time_cond_proj_dim
        cond = None if dim is None else tensor(verbs.guidance_embedding(jnp.asarray(batch.guidance_scale), dim))

        def network(x: torch.Tensor, t: float) -> torch.Tensor:
            return run_unet(unet, x, t, prepared.text.states, prepared.text.pooled, prepared.time_ids, cond)

        if batch.negative is None:
            return network
        return guided(network, tensor(batch.guidance_scale), tensor(batch.guidance_rescale))

    def finish(self, modules: Modules, state: State) -> torch.Tensor:
        """Latents to what the caller asked for."""
        if self.task.output == "latent":
            return state.sample
        vae = modules["vae"]
        rows = state.sample.split(1) if self.task.slices else [state.sample]
        pixels = torch.cat([decode(vae, unscale_latents(z, vae.config)).float() for z in rows])
        images = (pixels / 2 + 0.5).clamp(0, 1)
        return (images * 255).round().to(torch.uint8) if self.task.output == "uint8" else images


def encode_sd(encoders: list[Any], ids: list[torch.Tensor], clip_skip: int | None) -> Text:
    """The twin of :func:`diffuse_jax.pipelines.stable_diffusion.encode`."""
    (encoder,), (tokens,) = encoders, ids
    out = encoder(tokens, output_hidden_states=True)
    if not clip_skip:
        return Text(out.last_hidden_state)
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    return Text(norm(out.hidden_states[-1 - clip_skip]))


def encode_sdxl(encoders: list[Any], ids: list[torch.Tensor], clip_skip: int | None) -> Text:
    """The twin of :func:`diffuse_jax.pipelines.stable_diffusion_xl.encode`."""
    outputs = [encoder(tokens, output_hidden_states=True) for encoder, tokens in zip(encoders, ids, strict=True)]
    states = [out.hidden_states[-2 - (clip_skip or 0)] for out in outputs]
    return Text(torch.cat(states, -1), outputs[-1].text_embeds)


ENCODE: dict[Any, Callable[[list[Any], list[torch.Tensor], int | None], Text]] = {
    stable_diffusion.encode: encode_sd,
    stable_diffusion_xl.encode: encode_sdxl,
}
"""Our way to encode prompts -> its twin."""


def run_unet(
    unet: Any,
    x: torch.Tensor,
    t: float,
    states: torch.Tensor,
    pooled: torch.Tensor | None = None,
    time_ids: torch.Tensor | None = None,
    guidance: torch.Tensor | None = None,
) -> torch.Tensor:
    """The network's output, float32 ``[B,h,w,c]``, for ``x [B,h,w,c]`` at timestep ``t``."""
    cast = lambda y: None if y is None else y.to(unet.dtype)
    added = None if time_ids is None else {"text_embeds": cast(pooled), "time_ids": time_ids}
    timestep = torch.tensor(t, dtype=torch.float32, device=x.device)
    out = unet(
        channels_first(cast(x)), timestep, cast(states), timestep_cond=cast(guidance), added_cond_kwargs=added
    ).sample
    return channels_last(out).float()


def guided(both: Callable[[torch.Tensor, float], Any], scale: torch.Tensor, rescale: torch.Tensor) -> Any:
    """The twin of :func:`diffuse_jax.pipelines.denoise.guided`."""

    def denoiser(x: torch.Tensor, t: float) -> torch.Tensor:
        negative, positive = both(torch.cat([x, x]), t).chunk(2)
        result = negative + per_sample(scale, x) * (positive - negative)
        std = lambda y: y.std((1, 2, 3), correction=0, keepdim=True)
        phi = per_sample(rescale, x)
        return torch.where(phi > 0, phi * result * (std(positive) / std(result)) + (1 - phi) * result, result)

    return denoiser


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents ``[B,h,w,c]`` (not scaled) -> pixels ``[B,H,W,3]``, about [-1, 1]."""
    return channels_last(vae.decode(channels_first(latents.to(vae.dtype))).sample)


def unscale_latents(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """The twin of :func:`diffuse_jax.models.autoencoder_kl.unscale_latents`."""
    mean, std = latent_statistics(latents, config)
    return latents * std / config.scaling_factor + mean


def scale_latents(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """The twin of :func:`diffuse_jax.models.autoencoder_kl.scale_latents`."""
    mean, std = latent_statistics(latents, config)
    return (latents - mean) * config.scaling_factor / std


def latent_statistics(latents: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel, ``[c]``."""
    whole = lambda value: torch.full_like(latents[0, 0, 0], value)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        return latents.new_tensor(mean), latents.new_tensor(std)
    return whole(getattr(config, "shift_factor", None) or 0.0), whole(1.0)


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``[B]`` reshaped to multiply ``like [B, ...]``."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def joined(rows: tuple[torch.Tensor | None, ...]) -> Any:
    """Tensors below each other; None where there is none."""
    return None if rows[0] is None else torch.cat(rows)


def device_of(modules: Modules) -> torch.device:
    """Where the networks are."""
    return modules["unet"].device
