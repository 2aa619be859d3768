"""Upscaling of latents as a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from diffuse_jax.pipelines.editing import check_channels
from diffuse_jax.pipelines.family import default_steps, text_to_image
from diffuse_jax.pipelines.inputs import ImageInput, as_list, per_prompt, pixels, signed
from diffuse_jax.pipelines.parts.control import Beside
from diffuse_jax.pipelines.parts.latent_upscaler import SCALE, Preconditioned, SmallImage
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.tasks import below_guidance, changed, input_size, is_latents, latent_rows, vae_of


def latents_upscaled(pipe: Any, image: ImageInput, arguments: Mapping[str, Any]) -> Request:
    """Upscale ``image`` by two in the space of latents.

    Args:
      pipe: the pipeline; its UNet takes the small image's latents as further channels, and its sampler
        has ``prediction_type="sample"``.
      image: the image, or one per prompt; or scaled latents ``[B,h,w,c]``.
      arguments: of the call.

    Raises:
      ValueError: the image is missing, the UNet has other input channels, or the sampler expects another prediction.
    """
    height, width = input_size(pipe, image, "image")
    vae = vae_of(pipe)
    check_channels(pipe, vae.config.latent_channels, "the image's latents")
    if (kind := getattr(pipe.scheduler, "prediction_type", "sample")) != "sample":
        raise ValueError(f"{type(pipe).__name__} needs a scheduler with prediction_type='sample', got {kind!r}")
    request = text_to_image(pipe, default_steps(unprompted(arguments), 75), (SCALE * height, SCALE * width))
    if is_latents(image, vae):
        small = (height // vae.config.scale, width // vae.config.scale, vae.config.latent_channels)
        rows = {"image_latents": latent_rows(image, request, "image", small)}
    else:
        array = signed(pixels(image, (height, width), "image", resample=Image.Resampling.BICUBIC))
        rows = {"image": per_prompt(array, request.images, request.copies, "image")}
    conditions = (*request.method.conditions, SmallImage(vae))
    wrap = lambda inner: Preconditioned(Beside(inner, ("small_image",)))
    return changed(request, rows, conditions=conditions, denoiser=below_guidance(request.method.denoiser, wrap))


def unprompted(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with an empty prompt where the guidance scale is 0 for all of its images."""
    if arguments.get("prompt") is None:
        return dict(arguments)
    prompts = as_list(arguments["prompt"], "prompt")
    scales = np.ravel(arguments["guidance_scale"])
    each = np.broadcast_to(scales, len(prompts)) if len(scales) == 1 else scales
    if len(each) % len(prompts):
        return dict(arguments)  # a wrong number, which the family refuses
    off = (each.reshape(len(prompts), -1) == 0).all(1)
    return {**arguments, "prompt": ["" if no else prompt for prompt, no in zip(prompts, off, strict=True)]}
