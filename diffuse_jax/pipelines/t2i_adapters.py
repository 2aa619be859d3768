"""T2I-Adapters as a change to a request: they work for every family and beside ControlNets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffuse_jax.pipelines.family import output_size
from diffuse_jax.pipelines.inputs import ImageInput, finite, image_size, per_prompt, pixels
from diffuse_jax.pipelines.method import Net
from diffuse_jax.pipelines.parts.control import Steered
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.tasks import (
    below_guidance,
    changed,
    nets_of,
    one_per_net,
    request_size,
    require_image,
    vae_of,
)


def steered(request: Request, pipe: Any, images: ImageInput, options: Mapping[str, Any]) -> Request:
    """Apply the pipeline's T2I-Adapters to the UNet.

    Args:
      request: a request for any task.
      pipe: the pipeline, with one ``adapter`` or several.
      images: the control image, or one per prompt; with several adapters, a list with such images for each.
      options: the arguments of :class:`~diffuse_jax.pipelines.options.AdapterOptions`.

    Raises:
      ValueError: the number of images or scales is not that of the adapters, the factor is outside [0, 1], or the
        adapters do not fit each other or the size of the request.
    """
    nets = nets_of(pipe, "adapter")
    size = request_size(request, vae_of(pipe))
    check_size(nets, size)
    check_channels(nets, pipe.components["unet"].config.block_out_channels)
    each = zip(nets, by_adapter(nets, images), strict=True)
    control = tuple(
        per_prompt(
            pixels(image, size, "control image", channels=net.config.in_channels),
            request.images,
            request.copies,
            "control image",
        )
        for net, image in each
    )
    scale = options.get("adapter_conditioning_scale", 1.0)
    scales = one_per_net(scale, len(nets), "adapter_conditioning_scale", "T2I-Adapter")
    factor = finite(options.get("adapter_conditioning_factor", 1.0), "adapter_conditioning_factor")
    if factor.shape or not 0 <= factor <= 1:
        raise ValueError(f"adapter_conditioning_factor must be one number from 0 to 1, got {factor}")
    evaluations = int(int(request.plan.num_evaluations) * float(factor))
    rows = {
        "adapter_images": control,
        "adapter_scale": np.tile(np.array(scales, np.float32), (request.images, 1)),
        "adapter_evaluations": np.full(request.images, evaluations, np.int32),
    }
    return changed(request, rows, denoiser=below_guidance(request.method.denoiser, lambda d: Steered(d, nets)))


def adapter_size(pipe: Any, images: ImageInput, height: int | None, width: int | None) -> tuple[int, int]:
    """(height, width) in pixels: as given, or that of the (first) control image, rounded down to what the adapters and
    the autoencoder take.

    Raises:
      ValueError: the image is missing.
    """
    require_image(images, "image")
    nets = nets_of(pipe, "adapter")
    multiple = math.lcm(nets[0].config.downscale_factor, vae_of(pipe).config.scale)
    default = image_size(by_adapter(nets, images)[0], "image", multiple)
    return output_size(pipe, default[0] if height is None else height, default[1] if width is None else width)


def by_adapter(nets: tuple[Net, ...], images: Any) -> list[Any]:
    """The control images of each adapter.

    Raises:
      ValueError: with several adapters, it is not a list with one entry per adapter.
    """
    if nets[0].index is None:
        return [images]
    if not isinstance(images, list | tuple) or len(images) != len(nets):
        given = f"{len(images)}" if isinstance(images, list | tuple) else type(images).__name__
        raise ValueError(f"there are {len(nets)} T2I-Adapters; give a list with the control image of each, got {given}")
    return list(images)


def check_channels(nets: tuple[Net, ...], unet: tuple[int, ...]) -> None:
    """Check that the features of the adapters have the channels of the UNet's levels and of its middle block.

    Raises:
      ValueError: an adapter is for another UNet.
    """
    levels = (*unet, unet[-1])
    for net in nets:
        channels = tuple(stage.channels for stage in net.config.stages())
        if channels != levels[: len(channels)]:
            raise ValueError(
                f"this T2I-Adapter is for another UNet: its features have {channels} channels, finest first, and the "
                f"UNet's levels {unet}"
            )


def check_size(nets: tuple[Net, ...], size: tuple[int, int]) -> None:
    """Check that the adapters' features can be added, and that the size of the images suits them.

    Raises:
      ValueError: they differ in number of features or resolution, or a side is not a multiple of what they take.
    """
    kinds = {(net.config.downscale_factor, *((s.channels, s.halved) for s in net.config.stages())) for net in nets}
    if len(kinds) > 1:
        described = ", ".join(f"{net.config.adapter_type} of {net.config.channels}" for net in nets)
        raise ValueError(f"T2I-Adapters that act together must have features of the same sizes, got {described}")
    factor = nets[0].config.downscale_factor
    if wrong := [side for side in size if side % factor]:
        raise ValueError(f"height and width must be multiples of {factor} for this T2I-Adapter, got {wrong[0]}")
