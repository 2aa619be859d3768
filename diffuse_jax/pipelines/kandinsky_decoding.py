"""Requests of the decoders of Kandinsky 2.1 and 2.2, and the tasks that change them: image to image, inpainting, a hint
to follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from diffuse_jax.pipelines.families.kandinsky_v22 import given_embeds, movq_of
from diffuse_jax.pipelines.family import default_steps, request_of
from diffuse_jax.pipelines.inputs import ImageInput, image_list, mask_pixels, per_prompt, pixel_size, pixels, signed
from diffuse_jax.pipelines.options import check_names
from diffuse_jax.pipelines.parts.control import Beside
from diffuse_jax.pipelines.parts.movq import EncodeInitial, WidenedMask
from diffuse_jax.pipelines.parts.start import FromMixture, FromNoised
from diffuse_jax.pipelines.parts.step import KeepKnown
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.tasks import below_guidance, changed, is_latents, latent_rows, require_image
from diffuse_jax.schedulers import DDPMScheduler

STEPS = 100


def decoder_request(
    pipe: Any, named: Mapping[str, Any], options: Mapping[str, Any], height: int, width: int, **plan_options: Any
) -> Request:
    """The request of a decoder, starting from noise.

    Args:
      pipe: the pipeline.
      named: the arguments of the call that its class names: embeddings, guidance, a prompt.
      options: its further arguments.
      height, width: in pixels; rounded up to a multiple of the square of the autoencoder's factor.
      **plan_options: further arguments of the sampler's plan, for example ``strength``.

    Raises:
      ValueError, TypeError: an argument is invalid or contradicts another one.
    """
    check_names(type(pipe), options, pipe.family.options)
    given = {name: value for name, value in {**named, **options}.items() if value is not None}
    prompts = len(given_embeds(pipe, given, "image_embeds"))
    request = request_of(pipe, default_steps(given, STEPS), prompts, rounded_up(pipe, height, width), **plan_options)
    return check_channels(pipe, request)


def rounded_up(pipe: Any, height: int, width: int) -> tuple[int, int]:
    """A size as the decoder makes it.

    Raises:
      ValueError: a side is not positive or too long, or there are too many pixels.
    """
    multiple = movq_of(pipe).config.scale ** 2
    height, width = (-(-side // multiple) * multiple for side in pixel_size(height, width))
    return height, width


def check_channels(pipe: Any, request: Request) -> Request:
    """The request, if the UNet takes what the pipeline's task gives it.

    Raises:
      ValueError: it takes a mask, a hint or a prompt that the pipeline has not, or the other way round.
    """
    config, latents = pipe.components["unet"].config, request.method.latent_shape[-1]
    gives = 2 * latents + 1 if pipe.masked else latents
    if config.sample_channels != gives or config.addition_embed_type != pipe.added:
        raise ValueError(
            f"the UNet has {config.in_channels} input channels (addition_embed_type={config.addition_embed_type!r}), "
            f"which is not a UNet for {type(pipe).__name__}; take the class that the checkpoint names"
        )
    return request


def size_of(request: Request, pipe: Any) -> tuple[int, int]:
    """(height, width) of the request's images in pixels."""
    height, width, _ = request.method.latent_shape
    scale = movq_of(pipe).config.scale
    return height * scale, width * scale


def with_initial_image(request: Request, pipe: Any, image: ImageInput) -> Request:
    """The request with the latents of an image, or one per prompt, among its rows; or with latents as they are.

    Raises:
      ValueError, TypeError: something is not an image, or their number is wrong.
    """
    require_image(image, "image")
    movq = movq_of(pipe)
    if is_latents(image, movq):
        return changed(request, {"image_latents": latent_rows(image, request, "image")})
    size = size_of(request, pipe)
    array = signed(pixels(shrunk(image, size), size, "image"))
    rows = {"initial_image": per_prompt(array, request.images, request.copies, "image")}
    return changed(request, rows, conditions=(*request.method.conditions, EncodeInitial(movq)))


def shrunk(images: ImageInput, size: tuple[int, int]) -> list[Any]:
    """PIL images resized as Kandinsky's were for training, cubically and in one step; others as they are."""
    edges = size[::-1]
    resize = lambda image: image.convert("RGB").resize(edges, Image.Resampling.BICUBIC, reducing_gap=1)
    needs = lambda image: isinstance(image, Image.Image) and image.size != edges
    return [resize(image) if needs(image) else image for image in image_list(images, "image")]


def from_initial_image(request: Request, pipe: Any, image: ImageInput) -> Request:
    """Start from an image with noise added; the plan's ``strength`` sets how much."""
    request = with_initial_image(request, pipe, image)
    return changed(request, {}, start=FromNoised())


def from_mixed_image(request: Request, pipe: Any, image: ImageInput, strength: float) -> Request:
    """Start from an image with as much noise as Kandinsky 2.1 was made for.

    That is DDPM's (Ho et al. 2020) two timesteps before the one that the strength is a share of, whatever the sampler's
    noise schedule is.
    """
    request = with_initial_image(request, pipe, image)
    levels = DDPMScheduler().train_levels()
    last = int(pipe.scheduler.num_train_timesteps * strength) - 2
    mixture = levels[min(max(last, 0), len(levels) - 1)].astype(np.float32)
    return changed(request, {"mixture": np.tile(mixture, (request.images, 1))}, start=FromMixture())


def repainted(request: Request, pipe: Any, image: ImageInput, mask: ImageInput) -> Request:
    """Repaint an image where the mask is white, with a UNet that sees the mask and the rest of the image.

    The mask is made one latent pixel wider.
    """
    require_image(mask, "mask_image")
    request = with_initial_image(request, pipe, image)
    array = mask_pixels(mask, size_of(request, pipe), "mask_image")
    rows = {"mask": per_prompt(array, request.images, request.copies, "mask_image")}
    method = request.method
    return changed(
        request,
        rows,
        conditions=(*method.conditions, WidenedMask(movq_of(pipe).config.scale)),
        denoiser=below_guidance(method.denoiser, lambda d: Beside(d, ("masked_image_latents", "known_mask"))),
    )


def restored(request: Request) -> Request:
    """The request of :func:`repainted` with the rest of the image restored after each step."""
    return changed(request, {}, advance=KeepKnown(request.method.advance))


def with_hint(request: Request, pipe: Any, hint: ImageInput) -> Request:
    """The request with a control image, or one per prompt, that the UNet follows, such as a map of depth."""
    require_image(hint, "hint")
    array = pixels(hint, size_of(request, pipe), "hint")
    return changed(request, {"hint": per_prompt(array, request.images, request.copies, "hint")})
