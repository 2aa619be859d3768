"""Tasks of pipelines over pixels as requests: from an image, inpainting, super-resolution. They combine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffuse_jax.bounds import whole
from diffuse_jax.interpolation import weights
from diffuse_jax.pipelines.editing import beside_noised
from diffuse_jax.pipelines.family import default_steps, output_size, text_to_image
from diffuse_jax.pipelines.if_timesteps import named_timesteps
from diffuse_jax.pipelines.inputs import (
    ImageInput,
    image_size,
    image_sizes,
    mask_pixels,
    per_prompt,
    pixels,
    signed,
    whole_images,
)
from diffuse_jax.pipelines.method import Rows
from diffuse_jax.pipelines.parts.image import NoisedImage
from diffuse_jax.pipelines.parts.start import FromPixels
from diffuse_jax.pipelines.parts.step import KeepClean
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.tasks import changed, require_image

BICUBIC = Image.Resampling.BICUBIC
"""How images and masks are resized."""


def pixel_request(
    pipe: Any, arguments: Mapping[str, Any], size: tuple[int, int], steps: int, **plan_options: Any
) -> Request:
    """A text-to-image request over pixels; ``timesteps`` may be the name of a table.

    Raises:
      ValueError: there is no table of this name, or as :func:`~diffuse_jax.pipelines.family.text_to_image`.
    """
    arguments = dict(arguments) | {"timesteps": named_timesteps(arguments.get("timesteps"))}
    return text_to_image(pipe, default_steps(arguments, steps), size, **plan_options)


def sample_size(request: Request) -> tuple[int, int]:
    """(height, width) of the request's images in pixels, those of its samples."""
    height, width, _ = request.method.latent_shape
    return height, width


def fitted_size(pipe: Any, image: ImageInput, name: str) -> tuple[int, int]:
    """(height, width) for an image: an array's own; of a PIL image the shorter side becomes the network's size, the
    longer one a multiple of 8.

    Raises:
      ValueError: the image is missing, or the size is not one that the network takes.
    """
    require_image(image, name)
    height, width = image_sizes(image, name)[0]
    config = pipe.components["unet"].config
    edge, multiple = config.sample_size, config.divisor
    if isinstance(whole_images(image, name)[0], Image.Image) and isinstance(edge, int):
        longer = round(edge / 8 * max(height, width) / min(height, width)) * 8
        height, width = (edge, longer) if width >= height else (longer, edge)
    elif not (height and width) or height % multiple or width % multiple:
        raise ValueError(
            f"{name} is {height}x{width} pixels (height x width, channels last), and this network takes multiples of "
            f"{multiple}; resize it, or pass a PIL image, which is resized"
        )
    return output_size(pipe, height, width)


def from_pixels(request: Request, image: ImageInput, name: str) -> Request:
    """Start from an image with noise added; the plan's ``strength`` sets how much."""
    array = signed(pixels(image, sample_size(request), name, resample=BICUBIC))
    rows = {"clean_image": per_prompt(array, request.images, request.copies, name)}
    return changed(request, rows, start=FromPixels())


def repainted(request: Request, image: ImageInput, mask: ImageInput, name: str) -> Request:
    """Repaint ``image`` where ``mask`` is white; the rest is the clean image after each step."""
    require_image(mask, "mask_image")
    request = from_pixels(request, image, name)
    array = mask_pixels(mask, sample_size(request), "mask_image", BICUBIC)
    rows: Rows = {"clean_mask": per_prompt(array, request.images, request.copies, "mask_image")}
    return changed(request, rows, advance=KeepClean(request.method.advance))


def super_resolved(request: Request, pipe: Any, image: ImageInput, noise_level: int) -> Request:
    """The network sees ``image``, enlarged to the sample's size and noised to ``noise_level``, beside the sample.

    Raises:
      ValueError: the image is missing, the level is none of the ``image_noising_scheduler``, or the network takes no
        such image.
    """
    require_image(image, "image")
    takes, channels = pipe.components["unet"].config.in_channels, request.method.latent_shape[2]
    if takes != 2 * channels:
        raise ValueError(f"{type(pipe).__name__} needs a UNet with {2 * channels} input channels, got {takes}")
    scheduler = pipe.components["image_noising_scheduler"]
    most = scheduler.num_train_timesteps - 1
    if not 0 <= (level := whole(noise_level, "noise_level")) <= most:
        raise ValueError(f"noise_level must be an integer from 0 to {most}, got {noise_level!r}")
    small = signed(pixels(image, image_size(image, "image", 1), "image"))
    large = enlarged(small, sample_size(request))
    return beside_noised(request, large, scheduler, level, NoisedImage("upscaled image"))


def enlarged(images: Any, size: tuple[int, int]) -> Any:
    """Images ``[N,h,w,C]`` at another size, interpolated linearly with the corners in place; on the device if there."""
    matrices = [weights(old, new, cubic=False, align_corners=True) for old, new in zip(images.shape[1:3], size)]
    if isinstance(images, jax.Array):
        return _enlarged(images, *map(jnp.asarray, matrices))
    return np.einsum("ih,nhwc,jw->nijc", matrices[0], images, matrices[1], optimize=True).astype(np.float32)


@jax.jit
def _enlarged(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    return jnp.einsum("ih,nhwc,jw->nijc", rows, images, columns, precision=jax.lax.Precision.HIGHEST)


def checked_channels(pipe: Any, request: Request) -> Request:
    """The request, if the network takes the sample alone.

    Raises:
      ValueError: it takes more.
    """
    takes, channels = pipe.components["unet"].config.in_channels, request.method.latent_shape[2]
    if takes != channels:
        raise ValueError(
            f"{type(pipe).__name__} needs a UNet with {channels} input channels, got {takes}; with {2 * channels} it "
            "is one for super-resolution"
        )
    return request
