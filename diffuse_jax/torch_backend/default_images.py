"""Default images for comparisons of pipelines that take images: smooth and deterministic."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.pipelines.family import autoencoder_name
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


def default_images(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Those of ``image``, ``mask_image``, ``control_image`` and ``image_embeddings`` that calls take, for the
    checkpoint's default size, with one control image per ControlNet or T2I-Adapter; over pixels there may be an
    ``original_image`` too. Empty for a pipeline without a UNet."""
    if "image_embeddings" in inspect.signature(pipe.compose).parameters:
        return {"image_embeddings": maps(pipe.components["decoder"].config.effnet_embd)}
    if pipe.components.get("unet") is None:
        return {}
    size, vae = pipe.components["unet"].config.sample_size, pipe.components.get(autoencoder_name(pipe))
    scale = 1 if vae is None else vae.config.scale
    height, width = (edge * scale for edge in ((size, size) if isinstance(size, int) else size))
    smaller = UPSCALING.get(type(pipe).__name__, lambda scale: 1)(scale)
    takes = inspect.signature(pipe.compose).parameters
    controls = [name for name in CONTROLS if name in pipe.required]
    control = control_images(pipe, controls[0], height, width) if controls else None
    found = {
        "image": waves(height // smaller, width // smaller, 0),
        "original_image": waves(height, width, 1),
        "mask_image": disc(height, width),
        "control_image": control,
    }
    if controls and "control_image" not in takes:  # then "image" is the control image
        found["image"] = control
    return {name: image for name, image in found.items() if name in takes}


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
