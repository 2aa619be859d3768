"""Inpainting as a request: with a checkpoint made for it or any other, of the whole image or of a region."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from diffuse_jax.models import AsymmetricAutoencoderKL
from diffuse_jax.pipelines.family import output_size, text_to_image
from diffuse_jax.pipelines.inputs import ImageInput, mask_pixels, mask_shades, per_prompt, pixels
from diffuse_jax.pipelines.method import Rows
from diffuse_jax.pipelines.parts.control import Beside
from diffuse_jax.pipelines.parts.decode import ToImages
from diffuse_jax.pipelines.parts.image import EncodeMaskedImage, LatentMask
from diffuse_jax.pipelines.parts.start import FromImage, FromLatents
from diffuse_jax.pipelines.parts.step import KeepKnown
from diffuse_jax.pipelines.pasting import PasteBack, region
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.tasks import below_guidance, changed, continued, image_rows, latent_rows, vae_of


def inpainting(
    pipe: Any,
    image: ImageInput,
    mask: ImageInput,
    strength: float,
    options: Mapping[str, Any],
    arguments: Mapping[str, Any],
    *,
    denoising_start: float | None = None,
) -> Request:
    """Repaint ``image`` where ``mask`` is white, and keep the rest.

    A UNet with input channels for the mask and the masked image gets both; with any other, the known region is restored
    after each step. With a ``strength`` of 1 the run starts from pure noise.

    Args:
      pipe: the pipeline.
      image, mask: one, or one per prompt.
      strength: in (0, 1].
      options: the arguments of :class:`~diffuse_jax.pipelines.options.InpaintOptions`.
      arguments: the remaining arguments of the call.
      denoising_start: continue a run that another model began, from ``image`` as its noisy latents; instead of
        ``strength``.

    Raises:
      ValueError: the UNet has input channels for something else, or a run cannot be continued from such an image.
    """
    size = output_size(pipe, options.get("height"), options.get("width"))
    pad, output_type = options.get("padding_mask_crop"), arguments.get("output_type", "pil")
    cut = None if pad is None else region(image, mask, size, pad, output_type)
    if cut is not None:
        image, mask = cut.cut(cut.image, size), cut.cut(mask, size)
    begin: dict[str, Any] = {"strength": strength} if denoising_start is None else {"denoising_start": denoising_start}
    request = text_to_image(pipe, arguments, size, **begin)._replace(finish=cut)
    if options.get("keep_unmasked") and cut is None:
        request = request._replace(finish=pasting_back(request, image, mask, size))
    unet, vae = pipe.components["unet"].config, vae_of(pipe)
    latents = vae.config.latent_channels
    start: Any = FromImage(vae)
    rows = image_rows(request, pipe, image, "image")
    if denoising_start is None:
        rows["pure_noise"] = np.full(request.images, strength == 1)
    else:
        start, rows["latents"] = FromLatents(), continued(rows, vae)
    rows["mask"] = per_prompt(mask_pixels(mask, size, "mask_image"), request.images, request.copies, "mask_image")
    request = decoded_around(request, rows)
    method, conditions = request.method, (*request.method.conditions, LatentMask(vae.config.scale))
    if unet.in_channels == latents:
        advance = KeepKnown(method.advance)
        return changed(request, rows, start=start, conditions=conditions, advance=advance)
    if unet.in_channels != 2 * latents + 1:
        raise ValueError(
            f"the UNet has {unet.in_channels} input channels; inpainting takes {latents}, or {2 * latents + 1} "
            "(latents, mask and masked image)"
        )
    if (given := options.get("masked_image_latents")) is not None:
        rows["masked_image_latents"] = latent_rows(given, request, "masked_image_latents")
    elif "image" not in rows:
        raise ValueError("an image given as latents cannot be masked; give masked_image_latents too")
    beside = lambda inner: Beside(inner, ("latent_mask", "masked_image_latents"))
    denoiser = below_guidance(method.denoiser, beside)
    conditions = (*conditions, EncodeMaskedImage(vae))
    return changed(request, rows, start=start, conditions=conditions, denoiser=denoiser)


def decoded_around(request: Request, rows: Rows) -> Request:
    """The request with a decoder that sees the image and the mask among the rows, if it is one that looks at them.

    Raises:
      ValueError: the image is latents, or is decoded in tiles.
    """
    decode = request.method.decode
    if not isinstance(decode, ToImages) or not isinstance(decode.vae.model, AsymmetricAutoencoderKL):
        return request
    if decode.tile is not None:
        raise ValueError(
            "AsymmetricAutoencoderKL sees the known part of an image as a whole; inpaint with "
            "pipe.replace(vae_tiling=None)"
        )
    if "image" not in rows:
        raise ValueError("AsymmetricAutoencoderKL sees the known part of an image; give it as pixels, not as latents")
    return changed(request, {}, decode=replace(decode, around=True))


def pasting_back(request: Request, image: ImageInput, mask: ImageInput, size: tuple[int, int]) -> PasteBack:
    """What puts the original back at the end.

    Raises:
      ValueError: there are no pixels to put back, or none to put them into.
    """
    latents = isinstance(image, np.ndarray | jax.Array) and image.ndim == 4 and image.shape[-1] != 3
    if latents or request.output_type == "latent":
        raise ValueError('keep_unmasked needs an image of pixels and output_type="pil", "np" or "jax", not latents')
    each = lambda array, name: per_prompt(array, request.images, request.copies, name)
    originals = each(pixels(image, size, "image"), "image")
    shades = each(mask_shades(mask, size, "mask_image"), "mask_image")
    rows = np.arange(request.images)
    return PasteBack(originals[rows % len(originals)], shades[rows % len(shades)])
