"""Tasks with an image as a further input of the network: InstructPix2Pix and upscaling. They work for every family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffuse_jax.pipelines.family import default_steps, text_to_image
from diffuse_jax.pipelines.inputs import ImageInput, image_size, one_per_image, per_prompt, pixels, signed
from diffuse_jax.pipelines.modifiers.request import combined, more_negatives, with_copy
from diffuse_jax.pipelines.parts.combine import TwoScales
from diffuse_jax.pipelines.parts.control import Beside
from diffuse_jax.pipelines.parts.guidance import count_branches, is_branches
from diffuse_jax.pipelines.parts.image import ImageCondition, NoisedImage
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.tasks import below_guidance, changed, image_rows, require_image, vae_of


def instructed(
    pipe: Any,
    image: ImageInput,
    size: tuple[int, int],
    arguments: Mapping[str, Any],
    *,
    image_guidance_scale: float | Sequence[float],
    scaled: bool = False,
) -> Request:
    """Edit ``image`` as the prompt instructs (Brooks et al. 2023).

    Args:
      pipe: the pipeline; its UNet takes the image's latents as further channels.
      image: the image, or one per prompt, of this size; or latents ``[B,h,w,c]``.
      size: (height, width) in pixels.
      arguments: of the call.
      image_guidance_scale: how closely to follow the image, one value or one per image; below 1 there is no guidance.
      scaled: whether the network was trained on scaled latents.

    Raises:
      ValueError: the UNet has other input channels.
    """
    if np.any(np.asarray(image_guidance_scale) < 1):
        arguments = {**arguments, "guidance_scale": 1.0}
    request = text_to_image(pipe, default_steps(arguments, 100), size)
    vae = vae_of(pipe)
    check_channels(pipe, vae.config.latent_channels, "the image's latents")
    if count_branches(request.rows) > 1:
        copied = lambda row: with_copy(row, 0) if is_branches(row) else row
        rows = jax.tree.map(copied, request.rows, is_leaf=is_branches)
        rows["image_guidance_scale"] = one_per_image(image_guidance_scale, request.images, "image_guidance_scale")
        request = combined(more_negatives(request._replace(rows=rows), 2), {}, TwoScales())
    conditions = (*request.method.conditions, ImageCondition(vae, scaled))
    denoiser = below_guidance(request.method.denoiser, lambda inner: Beside(inner, ("image_condition",)))
    return changed(request, image_rows(request, pipe, image, "image"), conditions=conditions, denoiser=denoiser)


def upscaling(pipe: Any, image: ImageInput, noise_level: int, arguments: Mapping[str, Any]) -> Request:
    """Upscale ``image`` by the autoencoder's factor, with a UNet that sees it with noise (Rombach et al. 2022, D.6.1).

    Args:
      pipe: the pipeline, with a ``low_res_scheduler``.
      image: the image, or one per prompt, of any size.
      noise_level: timestep of ``low_res_scheduler`` to which it is noised.
      arguments: of the call.

    Raises:
      ValueError: the image is missing, ``noise_level`` is not one that the network was trained on, or the UNet has
        other input channels.
    """
    require_image(image, "image")
    most = int(pipe.options.get("max_noise_level", 350))
    if not 0 <= noise_level <= most:
        raise ValueError(f"noise_level must be an integer from 0 to {most}, got {noise_level!r}")
    check_channels(pipe, 3, "the image")
    low = image_size(image, "image", 1)
    scale = vae_of(pipe).config.scale
    request = text_to_image(pipe, default_steps(arguments, 75), (low[0] * scale, low[1] * scale))
    array = signed(pixels(image, low, "image"))
    return beside_noised(request, array, pipe.components["low_res_scheduler"], noise_level, NoisedImage())


def beside_noised(request: Request, array: Any, scheduler: Any, noise_level: int, part: NoisedImage) -> Request:
    """The request with an image as further channels of the network, noised; its level is the network's class.

    Args:
      request: of a task that is not upscaling.
      array: the images, ``[N,h,w,3]`` in [-1, 1], of the size of the sample.
      scheduler: says how much noise a level has.
      noise_level: a timestep of it.
      part: what adds the noise.
    """
    level = scheduler.train_levels()[noise_level]
    rows = {
        "low_res_image": per_prompt(array, request.images, request.copies, "image"),
        "low_res_level": np.tile(np.asarray(level, np.float32), (request.images, 1)),
        "class_labels": np.full(request.images, noise_level, np.int32),
    }
    conditions = (*request.method.conditions, part)
    denoiser = below_guidance(request.method.denoiser, lambda inner: Beside(inner, ("noised_image",)))
    return changed(request, rows, conditions=conditions, denoiser=denoiser)


def check_channels(pipe: Any, more: int, what: str) -> None:
    """Refuse a UNet that does not take so many channels beside the latents.

    Raises:
      ValueError: it says how many it takes.
    """
    latents, takes = vae_of(pipe).config.latent_channels, pipe.components["unet"].config.in_channels
    if takes != latents + more:
        raise ValueError(
            f"the UNet has {takes} input channels; {type(pipe).__name__} needs {latents + more}: {latents} of the "
            f"latents and {more} of {what}"
        )
