"""``noise=`` of a call: rows with the noise that PyTorch diffusers draws for the same seed, in its order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffuse_jax.noise import STREAMS
from diffuse_jax.pipelines.method import PlainStep, Rows, all_parts, noise_row
from diffuse_jax.pipelines.parts.image import NoisedImage
from diffuse_jax.pipelines.parts.latent_upscaler import SCALE, SmallImage
from diffuse_jax.pipelines.parts.stable_unclip import NoisedEmbedding
from diffuse_jax.pipelines.parts.start import FromImage
from diffuse_jax.pipelines.parts.step import KeepKnown
from diffuse_jax.pipelines.running import Request
from diffuse_jax.rounding import power_of_two

PURPOSES = ("low res image", "image", "small image", "image embedding", "noise", "masked image", "upscaled image")
"""What diffusers draws before the loop, in its order; "noise" is the start, the others are for encoded images."""

EACH_USED = (
    "CMStochasticIterativeScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
)
"""Samplers of diffusers that draw noise in each evaluation that uses it, and before those in no other."""

EACH = ("DDPMWuerstchenScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler")
"""Samplers of diffusers that draw noise in each evaluation, used or not."""


def with_noise(request: Request, scheduler: Any, options: Mapping[str, Any]) -> Request:
    """The request with all its noise from the stream that ``noise=`` names; as it is where none is named.

    A list of seeds stands for a list of generators, one for each image; one seed for one generator that draws for the
    whole batch.

    Args:
      request: with a seed for each image.
      scheduler: the one that made its plan.
      options: of the call.

    Raises:
      ValueError: diffusers would draw in an order that is not known, or that one seed does not determine.
    """
    kind = options.get("noise")
    if kind is None:
        return request
    rows, shape, seeds = request.rows, request.method.latent_shape, request.seeds or []
    together = request.images > 1 and bool(np.any(rows["index"]))
    purposes = drawn_before(request)
    if together and purposes not in ([], ["noise"]):
        raise ValueError(
            f'noise="{kind}" with images to encode takes one seed for each image, got one for all; '
            f"give a list of {request.images}"
        )
    steps = step_draws(request, scheduler, kind)
    count, first = (1, request.images) if together else (request.images, 1)
    shapes = [drawn_shape(name, request) for name in purposes]
    draws = [(first, one[-1], *one[:-1]) for one in (*shapes, *[shape] * len(steps))]
    each = zip(*[STREAMS[kind](seed, *draws) for seed in seeds[:count]], strict=True)
    arrays = [np.ascontiguousarray(np.moveaxis(np.concatenate(images), 1, -1)) for images in each]
    found: Rows = dict(zip(map(row_name, purposes), arrays, strict=False))
    if steps:
        # Room for a power of two, so that few numbers of steps compile a program of their own.
        size = power_of_two(int(request.plan.num_evaluations))
        found[noise_row("step")] = np.zeros((request.images, size, *shape), np.float32)
        found[noise_row("step")][:, steps] = np.stack(arrays[len(purposes) :], 1)
    return request._replace(rows=rows | {name: a for name, a in found.items() if name not in unread(request)})


def drawn_before(request: Request) -> list[str]:
    """Those of :data:`PURPOSES` for which diffusers draws in this request."""
    rows, kept = request.rows, unread(request)
    pure = bool(np.all(rows.get("pure_noise", False)))
    # Inpainting from pure noise encodes the image only if the known part is to be restored.
    encoded = any(isinstance(part, FromImage) for part in all_parts(request.method.start))
    noised = [part.purpose for part in request.method.conditions if isinstance(part, NoisedImage)]
    drawn = {
        "low res image": "low res image" in noised,
        "image": "image" in rows and encoded and (not pure or bool(kept)),
        "small image": "image" in rows and any(isinstance(part, SmallImage) for part in request.method.conditions),
        "image embedding": bool(noised_embeddings(request)),
        "noise": "noise" not in rows and ("latents" not in rows or "mask" in rows),
        "masked image": "image" in rows and "mask" in rows and "masked_image_latents" not in rows,
        "upscaled image": "upscaled image" in noised,
    }
    return [name for name in PURPOSES if drawn[name]]


def drawn_shape(purpose: str, request: Request) -> tuple[int, ...]:
    """The shape of one image's noise for one of :data:`PURPOSES`."""
    if purpose in ("low res image", "upscaled image"):
        return request.rows["low_res_image"].shape[1:]
    if purpose == "image embedding":
        return noised_embeddings(request)[0].shape
    shape = request.method.latent_shape
    return (shape[0] // SCALE, shape[1] // SCALE, shape[2]) if purpose == "small image" else shape


def noised_embeddings(request: Request) -> list[NoisedEmbedding]:
    """The parts that add noise to the embedding of an image."""
    return [part for part in request.method.conditions if isinstance(part, NoisedEmbedding)]


def row_name(purpose: str) -> str:
    """The row that holds the noise for one of :data:`PURPOSES`."""
    return purpose if purpose == "noise" else noise_row(purpose)


def unread(request: Request) -> tuple[str, ...]:
    """Noise that diffusers draws for nothing: a network without channels for the masked image does not see it."""
    keeps = any(isinstance(part, KeepKnown) for part in all_parts(request.method.advance))
    return (noise_row("masked image"),) if keeps else ()


def step_draws(request: Request, scheduler: Any, kind: str) -> list[int]:
    """The evaluations in which diffusers draws noise; none for a sampler without noise.

    Raises:
      ValueError: the order of its draws is not known, or a custom step takes them.
    """
    plan, name = request.plan, type(scheduler).__name__
    if drawing := [type(p).__name__ for p in all_parts(request.method.advance) if getattr(p, "draws", False)]:
        raise ValueError(f'noise="{kind}" cannot be had with {drawing[0]}, which draws noise of its own in every step')
    evaluations = int(plan.num_evaluations)
    used = np.flatnonzero(np.any(np.asarray(plan.rows)[:evaluations, :, -1] != 0, axis=1)).tolist()
    if not used:
        return []
    if name not in EACH_USED + EACH or np.any(plan.interval):
        raise ValueError(
            f'noise="{kind}" cannot be had with {name}, which draws noise in every step in a way of its own; '
            "use a sampler without noise, such as DDIMScheduler or EulerDiscreteScheduler"
        )
    if not any(isinstance(part, PlainStep) for part in all_parts(request.method.advance)):
        raise ValueError(
            f'noise="{kind}" with {name} needs the steps of PlainStep; {type(request.method.advance).__name__} has none'
        )
    return [*range(evaluations)] if name in EACH else used
