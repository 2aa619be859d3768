"""Requests of Kandinsky's decoders, and the tasks that change them: image to image, inpainting, a hint to follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from diffuse_jax.pipelines.families.kandinsky_v22 import given_embeds, movq_of
from diffuse_jax.pipelines.family import LONGEST_SIDE, default_steps, request_of
from diffuse_jax.pipelines.inputs import ImageInput, image_list, mask_pixels, per_prompt, pixels, signed
from diffuse_jax.pipelines.options import check_names
from diffuse_jax.pipelines.parts.control import Beside
from diffuse_jax.pipelines.parts.movq import EncodeInitial, WidenedMask
from diffuse_jax.pipelines.parts.start import FromNoised
from diffuse_jax.pipelines.parts.step import KeepKnown
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.tasks import below_guidance, changed, is_latents, latent_rows, require_image

STEPS = 100


def decoder_request(pipe: Any, arguments: Mapping[str, Any], height: int, width: int, **plan_options: Any) -> Request:
    """The request of a decoder, starting from noise.

    Args:
      pipe: the pipeline.
      arguments: those of the call besides the size.
      height, width: in pixels; rounded up to a multiple of the square of the autoencoder's factor.
      **plan_options: further arguments of the sampler's plan, for example ``strength``.

    Raises:
      ValueError, TypeError: an argument is invalid or contradicts another one.
    """
    named = ("image_embeds", "negative_image_embeds", "guidance_scale")
    check_names(type(pipe), {k: v for k, v in arguments.items() if k not in named}, pipe.family.options)
    given = {name: value for name, value in arguments.items() if value is not None}
    prompts = len(given_embeds(pipe, given, "image_embeds"))
    size = rounded_up(pipe, height, "height"), rounded_up(pipe, width, "width")
    request = request_of(pipe, default_steps(given, STEPS), prompts, size, **plan_options)
    return check_channels(pipe, request)


def rounded_up(pipe: Any, pixels: int, name: str) -> int:
    """A side as the decoder makes it.

    Raises:
      ValueError: it is not positive or too long.
    """
    if not 1 <= pixels <= LONGEST_SIDE:
        raise ValueError(f"{name} must be from 1 to {LONGEST_SIDE}, got {pixels}")
    multiple = movq_of(pipe).config.scale ** 2
    return -(-pixels // multiple) * multiple


def check_channels(pipe: Any, request: Request) -> Request:
    """The request, if the UNet takes what the pipeline's task gives it.

    Raises:
      ValueError: it takes a mask or a hint that the pipeline has not, or the other way round.
    """
    config, latents = pipe.components["unet"].config, request.method.latent_shape[-1]
    hinted, gives = config.addition_embed_type == "image_hint", 2 * latents + 1 if pipe.masked else latents
    if config.sample_channels != gives or hinted != pipe.hinted:
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


def repainted(request: Request, pipe: Any, image: ImageInput, mask: ImageInput) -> Request:
    """Repaint an image where the mask is white, with a UNet that sees the mask and the rest of the image.

    The mask is made one latent pixel wider. The rest is restored after each step.
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
        advance=KeepKnown(method.advance),
    )


def with_hint(request: Request, pipe: Any, hint: ImageInput) -> Request:
    """The request with a control image, or one per prompt, that the UNet follows, such as a map of depth."""
    require_image(hint, "hint")
    array = pixels(hint, size_of(request, pipe), "hint")
    return changed(request, {"hint": per_prompt(array, request.images, request.copies, "hint")})
