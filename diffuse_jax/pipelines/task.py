"""From a pipeline and a caller's arguments to the static task of a text-to-image program, checked on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffuse_jax.models.autoencoder_kl import AutoencoderKL
from diffuse_jax.pipelines.base import DiffusionPipeline
from diffuse_jax.pipelines.run import program_output
from diffuse_jax.pipelines.text_to_image import Prompts, Text, TextToImage
from diffuse_jax.text import CLIPTextModel

Encoders = Sequence[tuple[str, CLIPTextModel]]


def check_size(pipe: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int, int]:
    """The size in pixels; what is None comes from the checkpoint.

    Raises:
      ValueError: not a positive multiple of the autoencoder's scale; the text names the nearest sizes that are.
    """
    scale = pipe.components["vae"].config.scale
    default = pipe.components["unet"].config.sample_size
    default = (default, default) if default is None or isinstance(default, int) else default
    sizes = []
    for name, given, latents in zip(("height", "width"), (height, width), default, strict=True):
        if given is None and latents is None:
            raise ValueError(f"the checkpoint does not say its size (sample_size): give {name}")
        size = latents * scale if given is None else given
        if size < scale or size % scale:
            below = max(scale, size // scale * scale)
            raise ValueError(f"{name} must be a multiple of {scale}, got {size}; try {below} or {below + scale}")
        sizes.append(int(size))
    return sizes[0], sizes[1]


def guides(pipe: DiffusionPipeline, guidance_scale: Any) -> bool:
    """Whether classifier-free guidance runs: a scale above 1, and a network that does not take it as an input."""
    return pipe.components["unet"].config.time_cond_proj_dim is None and bool(np.any(np.asarray(guidance_scale) > 1))


def make_task(
    pipe: DiffusionPipeline,
    encoders: Sequence[str],
    encode: Callable[..., Text],
    height: int,
    width: int,
    output_type: str,
    clip_skip: int | None,
) -> TextToImage:
    """The static half of a request.

    Raises:
      ValueError: an unknown ``output_type``, or ``clip_skip`` outside the encoder's layers.
    """
    parts = tuple((name, pipe.components[name]) for name in encoders if pipe.components.get(name) is not None)
    layers = min(encoder.config.num_hidden_layers for _, encoder in parts)
    if clip_skip is not None and not 0 <= clip_skip < layers:
        raise ValueError(f"clip_skip must be from 0 to {layers - 1}, got {clip_skip}")
    return TextToImage(
        unet=pipe.components["unet"],
        vae=decoder(pipe.components["vae"]),
        text_encoders=parts,
        encode=encode,
        height=height,
        width=width,
        output=program_output(output_type),
        clip_skip=clip_skip,
        tile=pipe.vae_tiling,
        slices=pipe.vae_slicing,
    )


def decoder(vae: AutoencoderKL) -> AutoencoderKL:
    """The autoencoder as it decodes: SDXL's overflows in float16, which its config says by ``force_upcast``."""
    if vae.dtype == jnp.float16 and vae.config.force_upcast:
        return AutoencoderKL(vae.config, dtype=jnp.float32, param_dtype=vae.param_dtype)
    return vae


def text_of(given: Sequence[Any], embeds: Any, pooled: Any, prompts: int, name: str) -> Text:
    """Text that the caller encoded, as arrays with one row per prompt.

    Args:
      given: the prompts as text that the caller gave too, each None if not.
      embeds: ``[prompts,L,D]``.
      pooled: ``[prompts,P]``, or None.
      prompts: how many there are.
      name: of the argument, without ``_embeds``.

    Raises:
      ValueError: a shape is wrong, or there is text as well.
    """
    if any(text is not None for text in given):
        raise ValueError(f"give {name} or {name}_embeds, not both")
    states = np.asarray(embeds)
    if states.ndim != 3 or len(states) != prompts:
        raise ValueError(f"{name}_embeds must be [{prompts},L,D], got {states.shape}")
    if pooled is not None and (np.ndim(pooled) != 2 or len(pooled) != prompts):
        raise ValueError(f"the pooled embeddings of {name} must be [{prompts},P], got {np.shape(pooled)}")
    return Text(states, None if pooled is None else np.asarray(pooled))


def check_lengths(positive: Prompts, negative: Prompts) -> None:
    """Refuse halves of the doubled batch with different numbers of tokens.

    Raises:
      ValueError: it says both numbers.
    """
    tokens = [
        (next(iter((half.ids or {}).values())) if half.text is None else half.text.states).shape[1]
        for half in (positive, negative)
    ]
    if tokens[0] != tokens[1]:
        raise ValueError(
            f"the prompt has {tokens[0]} tokens and the negative one {tokens[1]}; guidance needs as many of both: "
            "give prompt_embeds and negative_prompt_embeds of one length"
        )
