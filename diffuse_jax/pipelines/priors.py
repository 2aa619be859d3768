"""Requests of priors: embeddings of images from prompts, or from prompts and images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffuse_jax.messages import brief
from diffuse_jax.pipelines.family import default_steps, request_of
from diffuse_jax.pipelines.image_prompts import encoder_pixels
from diffuse_jax.pipelines.inputs import ImageInput, as_list, embeddings, per_prompt
from diffuse_jax.pipelines.method import Net, Rows
from diffuse_jax.pipelines.options import check_names
from diffuse_jax.pipelines.parts.prior import EmbedImage, ImageEmbedding, embedded
from diffuse_jax.pipelines.parts.start import FromNoised
from diffuse_jax.pipelines.running import Request, apply
from diffuse_jax.pipelines.tasks import changed, require_image

STEPS = 25


def prior_request(pipe: Any, arguments: Mapping[str, Any], **plan_options: Any) -> Request:
    """The request of a prior, starting from noise.

    Args:
      pipe: the pipeline.
      arguments: those of the call.
      **plan_options: further arguments of the sampler's plan, for example ``strength``.

    Raises:
      ValueError, TypeError: an argument is invalid or contradicts another one.
    """
    named = ("prompt", "guidance_scale")
    check_names(type(pipe), {k: v for k, v in arguments.items() if k not in named}, pipe.family.options)
    given = {name: value for name, value in arguments.items() if value is not None}
    if (output := given.setdefault("output_type", "jax")) not in ("jax", "np"):
        raise ValueError(f"output_type must be 'jax' or 'np' for embeddings, got {brief(output)}")
    prompts = len(as_list(given.get("prompt"), "prompt"))
    request = request_of(pipe, default_steps(given, STEPS), prompts, (0, 0), **plan_options)
    if given.get("noise") and "negative_prompt" in given and request.images > 1:
        raise ValueError(
            f"noise={given['noise']!r} with a negative prompt takes one image, got {request.images}; PyTorch diffusers "
            "draws for all prompts first"
        )
    return request


def from_embedding(request: Request, pipe: Any, image: ImageInput) -> Request:
    """Start from the embedding of an image with noise added; the plan's ``strength`` sets how much.

    Args:
      request: a prior's request whose plan was made with ``strength``.
      pipe: the pipeline.
      image: an image of any size, or one per prompt; or embeddings, floating-point ``[N,E]``.

    Raises:
      ValueError, TypeError: something is not an image, or the number of images is wrong.
    """
    require_image(image, "image")
    name, array = "image_embeds", given_embeddings(pipe, image)
    if array is None:
        name, array = "image_pixels", encoder_pixels(pipe, image, "image", "image_processor")
    rows = {name: per_prompt(array, request.images, request.copies, "image")}
    conditions = (*request.method.conditions, ImageEmbedding(image_encoder(pipe)))
    return changed(request, rows, conditions=conditions, start=FromNoised())


def given_embeddings(pipe: Any, image: Any) -> Any:
    """Embeddings ``[N,E]`` float32, where they are given instead of images; None for images, which have colours.

    Raises:
      ValueError: they are not floating-point of the prior's width.
    """
    if not isinstance(image, np.ndarray | jax.Array) or image.ndim != 2:
        return None
    return embeddings(image, pipe.components["prior"].config.embedding_dim, "image (as embeddings)")


def seen_image(pipe: Any, image: ImageInput) -> Rows:
    """The rows of an image that :func:`image_embeddings` takes; errors as of :func:`from_embedding`."""
    pixels = encoder_pixels(pipe, image, "an image of images_and_prompts", "image_processor")
    if len(pixels) != 1:
        raise ValueError(f"each entry of images_and_prompts must be one image, got {len(pixels)} in an entry")
    return {"image_pixels": pixels}


def image_embeddings(pipe: Any, rows: Rows, copies: int) -> jax.Array:
    """The embeddings of an image, ``[copies,E]`` float32."""
    each = {name: np.repeat(array, copies, axis=0) for name, array in rows.items()}
    return apply(pipe, embedded, ImageEmbedding(image_encoder(pipe)), each)


def seen_images(pipe: Any, image: ImageInput, embeds: Any, name: str) -> tuple[str, Any]:
    """The images of a call as a row for :class:`EmbedImage <diffuse_jax.pipelines.parts.prior.EmbedImage>`, or their
    embeddings: its name, and an array with an entry for each.

    Args:
      pipe: the pipeline.
      image: images of any size, or None.
      embeds: ``[N,E]``, or None.
      name: of the argument with embeddings.

    Raises:
      ValueError, TypeError: neither or both are given, or something is no image or no embedding.
    """
    if (image is None) == (embeds is None):
        raise ValueError(f"give either image or {name}")
    if image is not None:
        return "image_pixels", encoder_pixels(pipe, image, "image")
    return "image_embeds", embeddings(embeds, image_encoder(pipe).config.projection_dim, name)


def with_images(request: Request, pipe: Any, name: str, array: Any) -> Request:
    """The request with what :func:`seen_images` returns, one row per image, and the encoder that it needs.

    Raises:
      ValueError: the number of images is wrong.
    """
    rows = {name: per_prompt(array, request.images, request.copies, "image")}
    encoders = (EmbedImage(image_encoder(pipe)),) if name == "image_pixels" else ()
    return changed(request, rows, conditions=(*encoders, *request.method.conditions))


def image_encoder(pipe: Any) -> Net:
    """The pipeline's image encoder."""
    return Net("image_encoder", pipe.components["image_encoder"])
