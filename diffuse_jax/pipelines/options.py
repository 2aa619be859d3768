"""The arguments that calls share, by name."""

from __future__ import annotations

import contextlib
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import jax

from diffuse_jax.pipelines.method import Replace
from diffuse_jax.pipelines.running import StepCallback


class RunOptions(TypedDict, total=False):
    """Arguments of every call that decide how a request is run, not what it is.

    Attributes:
      callback_on_step_end: called after each evaluation as ``callback(pipe, i, timestep, {"latents": ...})``; the
        program is then run step by step.
      progress_bar: show one; likewise.
      return_trajectory: return the sample before each evaluation and after the last one as ``out.trajectory``;
        likewise.
    """

    callback_on_step_end: StepCallback | None
    progress_bar: bool
    return_trajectory: bool


class CallOptions(RunOptions, total=False):
    """Arguments of every call.

    Attributes:
      num_inference_steps: the pipeline's default if neither ``timesteps`` nor ``sigmas`` say otherwise.
      timesteps, sigmas: the sampler's grid itself, descending.
      eta: noise of DDIM, 0 to 1 (other samplers refuse it).
      seed: an int from 0 to 2**32 - 1, or a list with one per image; chosen by the system if None.
      key: a typed ``jax.random`` key instead of a seed.
      noise: draw what PyTorch diffusers draws for the seed (then one up to 2**64 - 1): "torch" with a generator on the
        CPU, "cuda" with one on a GPU. A list of seeds stands for a list of generators, one seed for one generator.
      latents: ``[B, ...]`` standard normal noise to use instead of drawing it.
      output_type: "pil" (default), "np" or "latent"; see :class:`~diffuse_jax.pipelines.Output`.
      method: a function from the pipeline's method to the one to run, for parts of your own.
      rows: further rows for these parts: name -> array with one entry per image.
    """

    num_inference_steps: int | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    eta: float | None
    seed: int | Sequence[int] | None
    key: jax.Array | None
    noise: str | None
    latents: Any
    output_type: str
    method: Replace | None
    rows: Mapping[str, Any] | None


class TextOptions(CallOptions, total=False):
    """Arguments of every call with prompts, beside the first prompt itself.

    Attributes:
      negative_prompt: one, or one per prompt; empty if None.
      prompt_embeds, negative_prompt_embeds: ``[prompts,L,D]`` hidden states instead of prompts.
      num_images_per_prompt: 1 by default; those of one prompt follow each other.
      guidance_rescale: 0 (default) to 1, one or one per image; see Lin et al. 2024, section 3.4.
      clip_skip: take the hidden states this many layers before the last one.
      batch_size: maximum number of images per device call; all at once if None.
    """

    negative_prompt: str | Sequence[str] | None
    prompt_embeds: Any
    negative_prompt_embeds: Any
    num_images_per_prompt: int
    guidance_rescale: float | Sequence[float]
    clip_skip: int | None
    batch_size: int | None


class ControlOptions(TypedDict, total=False):
    """Arguments of every call with ControlNets, beside the control images; each is one number, or one per ControlNet.

    Attributes:
      controlnet_conditioning_scale: strength; the class says its default.
      control_guidance_start, control_guidance_end: share of the steps before and after which a ControlNet does not act,
        0 and 1 by default.
    """

    controlnet_conditioning_scale: float | Sequence[float]
    control_guidance_start: float | Sequence[float]
    control_guidance_end: float | Sequence[float]


class GuidanceOptions(TypedDict, total=False):
    """Where a class leaves it to the one that it extends.

    Attributes:
      guidance_scale: of classifier-free guidance, one or one per image; the class says its default.
    """

    guidance_scale: float | Sequence[float]


class StrengthOptions(TypedDict, total=False):
    """Likewise.

    Attributes:
      strength: in (0, 1], how much of the image is replaced; the class says its default.
    """

    strength: float


class ControlTextOptions(TextOptions, ControlOptions, GuidanceOptions, total=False):
    """:class:`TextOptions` and :class:`ControlOptions`."""


class ControlImageOptions(ControlTextOptions, StrengthOptions, total=False):
    """:class:`ControlTextOptions`, from an image."""


class InpaintOptions(TypedDict, total=False):
    """Arguments of every call that inpaints, beside the images.

    Attributes:
      masked_image_latents: ``[B,h,w,c]``, the masked image already encoded (inpainting checkpoints only).
      height, width: in pixels; the checkpoint's if None. PIL images are resized to it.
    """

    masked_image_latents: Any
    height: int | None
    width: int | None


class InpaintTextOptions(TextOptions, InpaintOptions, total=False):
    """:class:`TextOptions` and :class:`InpaintOptions`."""


class ControlInpaintOptions(InpaintTextOptions, ControlOptions, GuidanceOptions, StrengthOptions, total=False):
    """:class:`InpaintTextOptions` and :class:`ControlOptions`."""


Size = tuple[int, int]


class XLOptions(TextOptions, total=False):
    """Arguments of every call of the SDXL family, beside the first two prompts.

    Attributes:
      negative_prompt: if None, the unconditional embeddings are all zeros where the checkpoint says so
        (``force_zeros_for_empty_prompt``), and those of the empty prompt otherwise.
      negative_prompt_2: for the second encoder; the first one's if None.
      pooled_prompt_embeds, negative_pooled_prompt_embeds: ``[prompts,P]``, together with ``prompt_embeds`` and
        ``negative_prompt_embeds``.
      original_size, target_size: (height, width) in pixels, those of the image if None (micro-conditioning).
      crops_coords_top_left: (top, left) in pixels, (0, 0) by default.
      negative_original_size, negative_crops_coords_top_left, negative_target_size: of the unconditional branch. In
        text to image they are those of the conditional one unless both sizes are given. From an image, each size is
        unless it is given, and so is the crop, except for checkpoints with an aesthetic score.
      aesthetic_score, negative_aesthetic_score: 6.0 and 2.5, for checkpoints that take them (the refiner).
      denoising_end: share in (0, 1) of the schedule after which to stop and leave the rest to another model (the
        refiner); hand over with ``output_type="latent"``.
    """

    negative_prompt_2: str | Sequence[str] | None
    pooled_prompt_embeds: Any
    negative_pooled_prompt_embeds: Any
    original_size: Size | None
    target_size: Size | None
    crops_coords_top_left: Size
    negative_original_size: Size | None
    negative_target_size: Size | None
    negative_crops_coords_top_left: Size
    aesthetic_score: float
    negative_aesthetic_score: float
    denoising_end: float | None


class XLInpaintOptions(XLOptions, InpaintOptions, total=False):
    """:class:`XLOptions` and :class:`InpaintOptions`."""


def apart(options: Mapping[str, Any], kind: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that a ``TypedDict`` names, and the others."""
    names = kind.__annotations__
    return {k: v for k, v in options.items() if k in names}, {k: v for k, v in options.items() if k not in names}


def check_names(owner: type, given: Mapping[str, Any], known: type) -> None:
    """Refuse an argument that no call of a pipeline has.

    Args:
      owner: the pipeline's class.
      given: the arguments that its ``compose`` does not name.
      known: a ``TypedDict`` of those that there are.

    Raises:
      TypeError: it is named, with those that exist.
    """
    if unknown := sorted(set(given) - set(known.__annotations__)):
        names = ", ".join(sorted(argument_names(owner)))
        raise TypeError(f"{owner.__name__} has no argument {', '.join(unknown)}; it has {names}")


def argument_names(owner: type) -> set[str]:
    """Every argument of a pipeline's calls: those that its ``compose`` names, and those of the ``TypedDict`` that it
    unpacks; where it passes on whatever it gets, those of the class that it extends."""
    found: set[str] = set()
    for compose in (vars(cls)["compose"] for cls in owner.__mro__ if "compose" in vars(cls)):
        _, *parameters = inspect.signature(compose).parameters.values()  # without self
        found |= {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        rest = next((p.name for p in parameters if p.kind == p.VAR_KEYWORD), None)
        with contextlib.suppress(NameError):  # an annotation that only type checkers resolve
            rest = typing.get_type_hints(compose).get(rest, rest) if rest else None
        if not isinstance(rest, str):
            return found | {name for kind in typing.get_args(rest) for name in kind.__annotations__}
    return found
