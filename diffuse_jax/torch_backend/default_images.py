"""Default images for comparisons of pipelines that take images: smooth and deterministic."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.pipelines.family import STEPS, autoencoder_name
from diffuse_jax.pipelines.kandinsky_decoding import rounded_up
from diffuse_jax.pipelines.parts.latent_upscaler import SCALE

CONTROLS: dict[str, Callable[[Any], int]] = {
    "controlnet": lambda config: config.conditioning_channels,
    "adapter": lambda config: config.in_channels,
}
"""Components that take control images -> the channels of theirs, from their configuration."""

UPSCALING: dict[str, Callable[[int], int]] = {
    "StableDiffusionUpscalePipeline": lambda scale: scale,
    "StableDiffusionLatentUpscalePipeline": lambda scale: SCALE,
    **dict.fromkeys(
        ("IFSuperResolutionPipeline", "IFImg2ImgSuperResolutionPipeline", "IFInpaintingSuperResolutionPipeline"),
        lambda scale: 4,
    ),
}
"""Pipelines whose images are larger than the one they take -> how many times, from the autoencoder's factor."""


def default_images(pipe: DiffusionPipeline, options: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    """Those of ``image``, ``mask_image``, ``control_image``, ``hint``, ``image_latents`` and embeddings of images that
    calls take, for the size of the call, with one control image per ControlNet or T2I-Adapter; over pixels there may be
    an ``original_image`` too.

    Args:
      pipe: the pipeline.
      options: the arguments of the call that are given.
      prompts: the number of prompts.
    """
    takes = inspect.signature(pipe.compose).parameters
    found = embeddings(pipe)
    if pipe.components.get("unet") is None:
        found["image"] = waves(32, 32, 0)
    else:
        found |= images(pipe, *size_of(pipe, options))
    if "image_latents" in takes:
        found |= inverted(pipe, options, prompts, found["image"].shape)
    return {name: value for name, value in found.items() if name in takes}


def size_of(pipe: DiffusionPipeline, options: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of a call's images in pixels: those given, else the class's, else the checkpoint's."""
    takes, edge = inspect.signature(pipe.compose).parameters, pipe.components["unet"].config.sample_size
    own = dict(zip(("height", "width"), (edge, edge) if isinstance(edge, int) else edge))
    defaults = {name: takes[name].default if name in takes else None for name in own}
    asked = {name: options.get(name) or defaults[name] or own[name] * scale_of(pipe) for name in own}
    if "movq" in pipe.required:
        return rounded_up(pipe, asked["height"], asked["width"])
    return asked["height"], asked["width"]


def scale_of(pipe: DiffusionPipeline) -> int:
    """Pixels along the edge of a latent; 1 over pixels."""
    vae = pipe.components.get(autoencoder_name(pipe), pipe.components.get("movq"))
    return 1 if vae is None else vae.config.scale


def images(pipe: DiffusionPipeline, height: int, width: int) -> dict[str, Any]:
    """The images that a pipeline with a UNet may take."""
    takes = inspect.signature(pipe.compose).parameters
    smaller = UPSCALING.get(type(pipe).__name__, lambda scale: 1)(scale_of(pipe))
    controls = [name for name in CONTROLS if name in pipe.required]
    control = control_images(pipe, controls[0], height, width) if controls else None
    found = {
        "image": waves(height // smaller, width // smaller, 0),
        "original_image": waves(height, width, 1),
        "mask_image": disc(height, width),
        "control_image": control,
        "hint": waves(height, width, 2),
    }
    if controls and "control_image" not in takes:  # then "image" is the control image
        found["image"] = control
    return found


def embeddings(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What decoders take in the place of prompts or beside them: two of each."""
    found: dict[str, Any] = {}
    if "vqgan" in pipe.required:
        found["image_embeddings"] = maps(pipe.components["decoder"].config.effnet_embd)
    if "movq" in pipe.required:
        width = pipe.components["unet"].config.image_width
        each = lambda kind: 4 * waves(2, width, kind, 1)[..., 0] - 2
        found |= {"image_embeds": each(0), "negative_image_embeds": each(1)}
    return found


def inverted(pipe: DiffusionPipeline, options: Mapping[str, Any], prompts: int, image: Sequence[int]) -> dict[str, Any]:
    """What DiffEdit's call takes: latents for each evaluation, as its inversion gives, and a mask of their size."""
    strength = options.get("inpaint_strength", inspect.signature(pipe.compose).parameters["inpaint_strength"].default)
    steps, (height, width) = options.get("num_inference_steps", STEPS), (edge // scale_of(pipe) for edge in image[:2])
    evaluations = int(pipe.scheduler.plan(steps, strength=strength).num_evaluations)
    channels = pipe.components["vae"].config.latent_channels
    latents = [4 * waves(height, width, kind, channels) - 2 for kind in range(prompts * evaluations)]
    return {
        "image_latents": np.stack(latents).reshape(prompts, evaluations, height, width, channels),
        "mask_image": disc(height, width),
    }


def control_images(pipe: DiffusionPipeline, name: str, height: int, width: int) -> Any:
    """A control image for the network of this name, or a list with one for each of several."""
    nets = pipe.components[name]
    several = isinstance(nets, tuple)
    images = [
        waves(height, width, k + 1, CONTROLS[name](net.config)) for k, net in enumerate(nets if several else [nets])
    ]
    return images if several else images[0]


def maps(channels: int) -> np.ndarray:
    """Two small semantic maps for Würstchen's decoder, float32 ``[2,3,3,channels]``, of about unit size."""
    return np.stack([4 * waves(3, 3, kind, channels) - 2 for kind in range(2)])


def waves(height: int, width: int, kind: int, channels: int = 3) -> np.ndarray:
    """An image of coloured waves, float32 ``[height,width,channels]`` in [0, 1]."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j][..., None]
    colours = np.arange(1, channels + 1)
    return (0.5 + 0.5 * np.sin(5 * (x * colours + y * (kind + 1)) + kind)).astype(np.float32)


def disc(height: int, width: int) -> np.ndarray:
    """A mask that is 1 inside a disc in the middle, float32 ``[height,width]``."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return (x**2 + y**2 < 0.4).astype(np.float32)
