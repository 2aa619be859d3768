"""DiffEdit (Couairon et al. 2022) besides its inversion: the mask between two prompts, and sampling inside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

import jax
import numpy as np
from PIL import Image

from diffuse_jax.messages import renaming
from diffuse_jax.pipelines.families.clip import guidance_rows, repeat_rows
from diffuse_jax.pipelines.family import STEPS, Call, make_plan, text_to_image
from diffuse_jax.pipelines.inputs import (
    ImageInput,
    Prompt,
    image_sizes,
    joined_array,
    mask_pixels,
    noise_rows,
    number_of_prompts,
    per_prompt,
)
from diffuse_jax.pipelines.options import check_names
from diffuse_jax.pipelines.parts.combine import Between
from diffuse_jax.pipelines.parts.decode import Raw
from diffuse_jax.pipelines.parts.guidance import ClassifierFree, Guidance
from diffuse_jax.pipelines.parts.regularised import Regularised
from diffuse_jax.pipelines.parts.start import FromImage, FromLatents
from diffuse_jax.pipelines.parts.step import KeepInverted, Predict
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.tasks import changed, image_rows, input_size, vae_of
from diffuse_jax.rounding import power_of_two
from diffuse_jax.schedulers.request import check_strength

SOURCE, TARGET = ("source_negative_", "source_"), ("target_negative_", "target_")
"""The branches of guidance for each prompt, as prefixes of the arguments' names."""


class MaskOptions(TypedDict, total=False):
    """Further arguments of ``generate_mask``.

    Attributes:
      target_negative_prompt, source_negative_prompt: one, or one per prompt; empty if None.
      target_prompt_embeds, target_negative_prompt_embeds, source_prompt_embeds, source_negative_prompt_embeds:
        ``[prompts,L,D]`` hidden states instead of prompts.
      num_inference_steps: number of denoising steps, of which one is evaluated; 50 by default.
      prompt_syntax, long_prompts: as in every call.
      seed, key, noise: as in every call, one for each noise map.
    """

    target_negative_prompt: Prompt | None
    source_negative_prompt: Prompt | None
    target_prompt_embeds: Any
    target_negative_prompt_embeds: Any
    source_prompt_embeds: Any
    source_negative_prompt_embeds: Any
    num_inference_steps: int
    prompt_syntax: Literal["a1111", "compel"] | None
    long_prompts: bool
    seed: int | Sequence[int] | None
    key: jax.Array | None
    noise: str | None


@dataclasses.dataclass(frozen=True)
class MaskOf:
    """Masks ``[prompts,h,w]`` of 0 and 1 from the differences of all noise maps, ``[prompts * maps,h,w,c]``.

    Attributes:
      maps: number of noise maps per mask.
      ratio: differences count up to this multiple of their mean; the mask is where they are above half of that.
      pil: return black and white images.
    """

    maps: int
    ratio: float
    pil: bool

    def __call__(self, differences: np.ndarray) -> Any:
        by_prompt = np.abs(differences).reshape(-1, self.maps, *differences.shape[1:])
        found = by_prompt.mean((1, -1))
        masks = (found > 0.5 * self.ratio * found.mean((1, 2), keepdims=True)).astype(np.float32)
        return [Image.fromarray((mask * 255).astype(np.uint8)) for mask in masks] if self.pil else masks


def masking(
    pipe: Any,
    image: ImageInput = None,
    target_prompt: Prompt | None = None,
    source_prompt: Prompt | None = None,
    *,
    num_maps_per_mask: int = 10,
    mask_encode_strength: float = 0.5,
    mask_thresholding_ratio: float = 3.0,
    guidance_scale: float | Sequence[float] = 7.5,
    output_type: str = "np",
    **options: Unpack[MaskOptions],
) -> Request:
    """Find where an image would change between two prompts: float32 ``[prompts,h,w]`` of 0 and 1 at the resolution of
    the latents, or black and white images.

    The image is noised several times, and the predictions for both prompts are compared. The mask is white where they
    differ by more than half of ``mask_thresholding_ratio`` times the mean; each image has its own mean.

    Args:
      image: the image, or one per prompt; or latents ``[B,h,w,c]``.
      target_prompt, source_prompt: what it should show and what it shows; one prompt or a list, or give
        ``target_prompt_embeds`` and ``source_prompt_embeds``.
      num_maps_per_mask: how many times the image is noised.
      mask_encode_strength: in (0, 1], how much.
      mask_thresholding_ratio: positive; smaller makes larger masks.
      guidance_scale: of both predictions, one value or one per noised image.
      output_type: "np" or "pil".
      **options: see :class:`~diffuse_jax.pipelines.diffedit.MaskOptions`.

    Raises:
      ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
    """
    check_names(type(pipe), options, MaskOptions)
    if pipe.image_adapters.nets:
        raise ValueError(
            "generate_mask compares prompts and takes no images of IP-Adapters; call it on pipe.unload_ip_adapter()"
        )
    if output_type not in ("np", "pil"):
        raise ValueError(f'output_type must be "np" or "pil", got {output_type!r}')
    check_strength(mask_encode_strength, "mask_encode_strength")
    if num_maps_per_mask < 1:
        raise ValueError(f"num_maps_per_mask must be at least 1, got {num_maps_per_mask}")
    if not mask_thresholding_ratio > 0:
        raise ValueError(f"mask_thresholding_ratio must be positive, got {mask_thresholding_ratio!r}")
    named: dict[str, Any] = {"target_prompt": target_prompt, "source_prompt": source_prompt}
    named |= {"guidance_scale": guidance_scale, **options}
    given = {name: value for name, value in named.items() if value is not None}
    counts = [
        number_of_prompts(given.get(name), given.get(f"{name}_embeds"), name)
        for name in ("target_prompt", "source_prompt")
    ]
    if counts[0] != counts[1]:
        raise ValueError(f"there are {counts[0]} target prompts and {counts[1]} source prompts; give the same number")
    call = Call(given, counts[0], num_maps_per_mask, input_size(pipe, image, "image"))
    first = 0 if pipe.family.uses_guidance(pipe, call) else 1
    branches = (*SOURCE[first:], *TARGET[first:])
    rows = pipe.family.text_rows(pipe, call, branches, (*SOURCE, *TARGET))
    method = pipe.family.method(pipe, call, rows)
    denoiser = method.denoiser.inner if isinstance(method.denoiser, Guidance) else method.denoiser
    rows = {name: repeat_rows(value, call.copies) for name, value in rows.items()}
    rows |= guidance_rows(call, first == 0)
    noise, seeds = noise_rows(call.images, given, method.latent_shape, pipe.mesh)
    with renaming({"strength": "mask_encode_strength"}):
        plan = make_plan(pipe.scheduler, given, STEPS, strength=mask_encode_strength)
    plan = dataclasses.replace(plan, num_evaluations=np.int32(1))
    method = dataclasses.replace(
        method,
        denoiser=ClassifierFree(denoiser, Between()),
        start=FromImage(vae_of(pipe)),
        advance=Predict(),
        decode=Raw(),
    )
    finish = MaskOf(num_maps_per_mask, float(mask_thresholding_ratio), output_type == "pil")
    request = Request(method, rows | noise, plan, "np", seeds, call.copies, finish)
    return changed(request, image_rows(request, pipe, image, "image"))


def regularised(request: Request, scheduler: Any, weights: tuple[float, float], steps: int, shifts: int) -> Request:
    """An inversion whose predicted noise is regularised (the part ``Regularised``).

    Args:
      request: the inversion.
      scheduler: its sampler.
      weights: of the auto-correlation and of the divergence.
      steps, shifts: numbers of repetitions, and of shifts in each.

    Raises:
      ValueError: a number is negative.
    """
    names = ("lambda_auto_corr", "lambda_kl", "num_reg_steps", "num_auto_corr_rolls")
    for name, value in zip(names, (*weights, steps, shifts), strict=True):
        if not np.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be at least 0, got {value!r}")
    if steps == 0:
        return request
    evaluations = int(request.plan.num_evaluations)
    timesteps = np.asarray(request.plan.timesteps[:evaluations]).astype(int)
    alpha, sigma = np.sqrt(scheduler.alpha_bar[timesteps]), np.sqrt(1 - scheduler.alpha_bar[timesteps])
    factors = {
        "epsilon": (np.zeros_like(alpha), np.ones_like(alpha)),
        "sample": (1 / sigma, -alpha / sigma),
        "v_prediction": (sigma, alpha),
    }[scheduler.prediction_type]
    room = np.zeros((power_of_two(evaluations), 2), np.float32)
    room[:evaluations] = np.stack(factors, -1)
    numbers = np.array([*weights, steps, shifts if weights[0] > 0 else 0], np.float32)
    rows = {"regularisation": np.tile(numbers, (request.images, 1)), "to_noise": np.tile(room, (request.images, 1, 1))}
    return changed(request, rows, denoiser=Regularised(request.method.denoiser))


def inside_mask(pipe: Any, mask: ImageInput, inverted: Any, strength: float, arguments: Mapping[str, Any]) -> Request:
    """Sample where ``mask`` is white, from an inverted image that is restored elsewhere.

    Args:
      pipe: the pipeline.
      mask: of the latents' size, one or one per prompt.
      inverted: ``[prompts,evaluations,h,w,c]``, or both first axes as one, or a list of such; the noisiest first.
      strength: in (0, 1], the share of the steps to run.
      arguments: of the call.

    Raises:
      ValueError: something is missing, or does not have the shape or number that it should.
      TypeError: ``latents`` has no meaning here, or ``inverted`` is no array of numbers.
    """
    if mask is None:
        raise ValueError("give mask_image: generate_mask finds one from prompts")
    if inverted is None:
        raise ValueError("give image_latents: the latents that invert finds for an image")
    if arguments.get("latents") is not None:
        raise TypeError("DiffEdit takes no latents: the run starts from image_latents")
    check_strength(strength, "inpaint_strength")
    vae = vae_of(pipe)
    inverted = joined_array(inverted, "image_latents").astype(np.float32)
    if inverted.ndim not in (4, 5) or inverted.shape[-1] != vae.config.latent_channels:
        raise ValueError(
            f"image_latents must be [prompts,steps,h,w,{vae.config.latent_channels}] (channel-last), got "
            f"{inverted.shape}"
        )
    latent_size = inverted.shape[-3:-1]
    size = (latent_size[0] * vae.config.scale, latent_size[1] * vae.config.scale)
    with renaming({"strength": "inpaint_strength"}):
        request = text_to_image(pipe, arguments, size, strength=strength)
    evaluations, prompts = int(request.plan.num_evaluations), request.images // request.copies
    if inverted.ndim == 4 and len(inverted) == prompts * evaluations:
        inverted = inverted.reshape(prompts, evaluations, *inverted.shape[1:])
    if inverted.shape[:2] != (prompts, evaluations):
        raise ValueError(
            f"image_latents must have {evaluations} samples for each of {prompts} prompts, got {inverted.shape[:-3]}; "
            "give invert and the call the same num_inference_steps, inpaint_strength and number of prompts"
        )
    masks = [*mask] if isinstance(mask, np.ndarray | jax.Array) and mask.ndim == 3 else mask
    wrong = [found for found in image_sizes(masks, "mask_image") if found != latent_size]
    if wrong:
        shown = "{}x{}".format
        raise ValueError(
            f"mask_image must have the size of the latents, {shown(*latent_size)}, as generate_mask gives it; got "
            f"{shown(*wrong[0])}"
        )
    shades = per_prompt(mask_pixels(masks, latent_size, "mask_image"), request.images, request.copies, "mask_image")
    room = np.zeros((prompts, power_of_two(evaluations), *inverted.shape[2:]), np.float32)
    room[:, :evaluations] = inverted
    each = lambda array: np.repeat(array, request.copies, axis=0)
    rows = {"latents": each(inverted[:, 0]), "inverted": each(room), "latent_mask": shades}
    return changed(request, rows, start=FromLatents(), advance=KeepInverted(request.method.advance))
