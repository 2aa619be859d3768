"""The arguments that the calls of several pipelines share, as typed dictionaries."""

from __future__ import annotations

import contextlib
import functools
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import jax

from diffuse_jax.pipelines.method import Replace
from diffuse_jax.pipelines.running import Modifier, StepCallback


class RunOptions(TypedDict, total=False):
    """Arguments of every call that control how a request is run. With any of them, the run goes step by step.

    Attributes:
      callback_on_step_end: called after each evaluation as ``callback(pipe, i, timestep, {"latents": ...})``.
      progress_bar: show a progress bar.
      return_trajectory: return the sample before each evaluation and after the last one as ``out.trajectory``.
    """

    callback_on_step_end: StepCallback | None
    progress_bar: bool
    return_trajectory: bool


class CallOptions(RunOptions, total=False):
    """Arguments of every call.

    Attributes:
      num_inference_steps: number of denoising steps; the pipeline's default unless ``timesteps`` or ``sigmas`` is
        given.
      timesteps, sigmas: an explicit grid for the sampler, descending.
      eta: noise of DDIM, from 0 to 1 (an error with other samplers).
      seed: an int from 0 to 2**32 - 1, or a list with one per image; random if None.
      key: a typed ``jax.random`` key instead of a seed.
      noise: "torch" or "cuda" uses the noise that PyTorch diffusers draws for the seed (which may then be up to
        2**64 - 1), with a generator on the CPU or on a GPU. A list of seeds corresponds to a list of generators, a
        single seed to one generator for the batch.
      latents: ``[B, ...]`` standard normal noise to start from, instead of sampling it.
      output_type: "pil" (default), "np", "jax" or "latent"; see :class:`~diffuse_jax.pipelines.Output`.
      method: a function from the pipeline's method to the one to run, for custom parts.
      rows: additional rows for such parts: name -> array with one entry per image.
      modifiers: one or several of :mod:`~diffuse_jax.pipelines.modifiers`: other guidance, FreeU, windows ...
      lora_scale: strength of all live adapters, one number or one per image; 1 if None.
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
    modifiers: Modifier | Sequence[Modifier]
    lora_scale: float | Sequence[float] | None


class TextOptions(CallOptions, total=False):
    """Arguments of every call with prompts, besides the prompt itself.

    Attributes:
      negative_prompt: one, or one per prompt; empty if None.
      prompt_embeds, negative_prompt_embeds: ``[prompts,L,D]`` hidden states instead of prompts.
      num_images_per_prompt: 1 by default; the images of a prompt are consecutive.
      guidance_rescale: from 0 (default) to 1, one value or one per image; see Lin et al. 2024, section 3.4.
      clip_skip: use the text encoder's hidden states from this many layers before the last one.
      prompt_syntax: "a1111" or "compel", for prompts with weights; None (default) takes the text as it is.
      long_prompts: encode prompts of any length in chunks, instead of cutting what does not fit (default).
      batch_size: maximum number of images per device call; all at once if None.
      ip_adapter_image: with :meth:`load_ip_adapter <diffuse_jax.DiffusionPipeline.load_ip_adapter>`, an image, or a
        list with an image or a list of images for each adapter.
      ip_adapter_image_embeds: instead, a list with embeddings for each adapter, as
        :meth:`~diffuse_jax.DiffusionPipeline.prepare_ip_adapter_image_embeds` returns them.
      ip_adapter_scale: strength in this call, as in :meth:`~diffuse_jax.DiffusionPipeline.set_ip_adapter_scale`.
      ip_adapter_masks: a list with None or a mask for each image (several: a list) of each adapter, white where the
        image acts.
    """

    negative_prompt: str | Sequence[str] | None
    prompt_embeds: Any
    negative_prompt_embeds: Any
    num_images_per_prompt: int
    guidance_rescale: float | Sequence[float]
    clip_skip: int | None
    prompt_syntax: Literal["a1111", "compel"] | None
    long_prompts: bool
    batch_size: int | None
    ip_adapter_image: Any
    ip_adapter_image_embeds: Any
    ip_adapter_scale: Any
    ip_adapter_masks: Any


class PixelTextOptions(CallOptions, total=False):
    """Arguments of calls of DeepFloyd IF, besides the prompt itself.

    Attributes:
      timesteps: also the name of one of IF's tables, such as "fast27"; see :mod:`diffuse_jax.pipelines.if_timesteps`.
      negative_prompt: one, or one per prompt; empty if None.
      prompt_embeds, negative_prompt_embeds: ``[prompts,L,D]`` hidden states instead of prompts, as ``encode_prompt``
        returns them.
      num_images_per_prompt: 1 by default; the images of a prompt are consecutive.
      guidance_rescale: from 0 (default) to 1, one value or one per image; see Lin et al. 2024, section 3.4.
      clean_caption: prompts are always made lower case; True warns that nothing else is cleaned, which would take
        packages (beautifulsoup4, ftfy) that this library does not use.
      batch_size: maximum number of images per device call; all at once if None.
    """

    timesteps: Sequence[float] | str | None  # type: ignore[misc]
    negative_prompt: str | Sequence[str] | None
    prompt_embeds: Any
    negative_prompt_embeds: Any
    num_images_per_prompt: int
    guidance_rescale: float | Sequence[float]
    clean_caption: bool
    batch_size: int | None


class StableUnCLIPOptions(TextOptions, total=False):
    """:class:`TextOptions` of calls whose UNet takes an image embedding with noise added.

    Attributes:
      noise_level: how much noise, one step of ``image_noising_scheduler`` or one per image, from 0 (default). More
        noise means more varied images.
    """

    noise_level: int | Sequence[int]


class UnCLIPOptions(RunOptions, total=False):
    """Arguments of a call of unCLIP, besides those of its stages; they mean what they mean in :class:`CallOptions`.

    Attributes:
      num_images_per_prompt: 1 by default; the images of a prompt are consecutive.
      seed, key: of all stages, each of which begins its noise anew.
      batch_size, method, rows, modifiers: of the last stage, the super-resolution.
    """

    num_images_per_prompt: int
    seed: int | Sequence[int] | None
    key: jax.Array | None
    noise: str | None
    output_type: str
    batch_size: int | None
    method: Replace | None
    rows: Mapping[str, Any] | None
    modifiers: Modifier | Sequence[Modifier]
    lora_scale: float | Sequence[float] | None


class ImageVariationOptions(CallOptions, total=False):
    """Arguments of a call with images in the place of prompts.

    Attributes:
      num_images_per_prompt: images per input image, 1 by default; they are consecutive.
      batch_size: maximum number of images per device call; all at once if None.
    """

    num_images_per_prompt: int
    batch_size: int | None


class EncoderTextOptions(CallOptions, total=False):
    """Arguments of calls with prompts whose text encoder has one output, besides the prompt itself.

    Attributes:
      negative_prompt: one, or one per prompt; empty if None.
      prompt_embeds, negative_prompt_embeds: ``[prompts,L,D]`` hidden states instead of prompts.
      num_images_per_prompt: 1 by default; the images of a prompt are consecutive.
      guidance_rescale: from 0 (default) to 1, one value or one per image; see Lin et al. 2024, section 3.4.
      prompt_syntax: "a1111" or "compel", for prompts with weights; None (default) takes the text as it is.
      long_prompts: encode prompts of any length in chunks, instead of cutting what does not fit (default).
      batch_size: maximum number of images per device call; all at once if None.
    """

    negative_prompt: str | Sequence[str] | None
    prompt_embeds: Any
    negative_prompt_embeds: Any
    num_images_per_prompt: int
    guidance_rescale: float | Sequence[float]
    prompt_syntax: Literal["a1111", "compel"] | None
    long_prompts: bool
    batch_size: int | None


class WuerstchenOptions(EncoderTextOptions, total=False):
    """Arguments of a call of either stage of Würstchen, besides the prompt: those of :class:`EncoderTextOptions`."""


class WuerstchenDecoderOptions(WuerstchenOptions, total=False):
    """:class:`WuerstchenOptions` of the second stage.

    Attributes:
      image_embeddings: the first stage's maps, ``[prompts,k,l,c]``.
    """

    image_embeddings: Any


class WuerstchenCombinedOptions(RunOptions, total=False):
    """Arguments of a call of both stages of Würstchen, besides the prompt; they mean what they mean in
    :class:`CallOptions` and :class:`WuerstchenOptions`.

    Attributes:
      prompt_embeds, negative_prompt_embeds, latents: of the prior.
      seed, key, noise: of both stages, each of which begins its noise anew.
      num_images_per_prompt: maps per prompt, and one image per map.
      batch_size, method, rows, modifiers: of the decoder.
    """

    negative_prompt: str | Sequence[str] | None
    prompt_embeds: Any
    negative_prompt_embeds: Any
    num_images_per_prompt: int
    prompt_syntax: Literal["a1111", "compel"] | None
    long_prompts: bool
    seed: int | Sequence[int] | None
    key: jax.Array | None
    noise: str | None
    latents: Any
    output_type: str
    batch_size: int | None
    method: Replace | None
    rows: Mapping[str, Any] | None
    modifiers: Modifier | Sequence[Modifier]
    lora_scale: float | Sequence[float] | None


class PriorOptions(CallOptions, total=False):
    """Arguments of a call of a prior, besides the prompt.

    Attributes:
      negative_prompt: one, or one per prompt. The prior makes the negative embedding of it; if None, the negative
        embedding is that of an empty image, and guidance is away from the empty prompt.
      num_images_per_prompt: embeddings per prompt, 1 by default; those of a prompt are consecutive.
      latents: ``[B,E]`` standard normal noise; with a negative prompt ``[B,E,2]``, the second for that.
      batch_size: maximum number of embeddings per device call; all at once if None.
    """

    negative_prompt: str | Sequence[str] | None
    num_images_per_prompt: int
    batch_size: int | None


class EmbeddingOptions(CallOptions, total=False):
    """Arguments of a call with image embeddings in the place of prompts.

    Attributes:
      num_images_per_prompt: images per embedding, 1 by default; they are consecutive.
      batch_size: maximum number of images per device call; all at once if None.
    """

    num_images_per_prompt: int
    batch_size: int | None


class PromptedEmbeddingOptions(EmbeddingOptions, total=False):
    """:class:`EmbeddingOptions` of a decoder that takes prompts too.

    Attributes:
      negative_prompt: one for all embeddings, or a list as for ``prompt``; empty if None.
    """

    negative_prompt: str | Sequence[str] | None


class CombinedOptions(EmbeddingOptions, total=False):
    """Arguments of a call of a prior and a decoder in one, besides the prompt.

    Attributes:
      negative_prompt: one, or one per prompt, for the prior.
      prior_num_inference_steps: of the prior, 25 by default; ``num_inference_steps`` is the decoder's, 100 by default.
      prior_guidance_scale: of the prior, 4 by default.
      prior_callback_on_step_end: called after each evaluation of the prior, as ``callback_on_step_end`` after those of
        the decoder.
      latents: standard normal noise for the prior; see :class:`PriorOptions`.
    """

    negative_prompt: str | Sequence[str] | None
    prior_num_inference_steps: int
    prior_guidance_scale: float | Sequence[float]
    prior_callback_on_step_end: StepCallback | None


class PooledTextOptions(TextOptions, total=False):
    """Arguments of calls whose UNet takes a pooled embedding of the prompt too.

    Attributes:
      pooled_prompt_embeds, negative_pooled_prompt_embeds: ``[prompts,P]``, required with ``prompt_embeds`` and
        ``negative_prompt_embeds``.
    """

    pooled_prompt_embeds: Any
    negative_pooled_prompt_embeds: Any


class ControlOptions(TypedDict, total=False):
    """Arguments of every call with ControlNets, besides the control images; each is one number, or one per ControlNet.

    Attributes:
      controlnet_conditioning_scale: strength; the default depends on the class.
      control_guidance_start, control_guidance_end: the fraction of the steps at which a ControlNet starts and stops
        acting, 0 and 1 by default.
      guess_mode: apply the ControlNets to the conditional branch alone, and more weakly at finer levels; works without
        a prompt. Always on for ControlNets that pool their outputs (shuffle).
    """

    controlnet_conditioning_scale: float | Sequence[float]
    control_guidance_start: float | Sequence[float]
    control_guidance_end: float | Sequence[float]
    guess_mode: bool


class AdapterOptions(TypedDict, total=False):
    """Arguments of every call with T2I-Adapters, besides the control images.

    Attributes:
      adapter_conditioning_scale: strength, 1 by default: one number, or one per adapter; several are added.
      adapter_conditioning_factor: the fraction of the evaluations, from the first, at which they act; 1 by default.
    """

    adapter_conditioning_scale: float | Sequence[float]
    adapter_conditioning_factor: float


class GuidanceOptions(TypedDict, total=False):
    """The guidance argument, for classes that pass it on to the class they extend.

    Attributes:
      guidance_scale: scale of classifier-free guidance, one value or one per image; the default depends on the class.
    """

    guidance_scale: float | Sequence[float]


class StrengthOptions(TypedDict, total=False):
    """The strength argument, for classes that pass it on to the class they extend.

    Attributes:
      strength: in (0, 1], how much the image is changed; the default depends on the class.
    """

    strength: float


class SizeOptions(TypedDict, total=False):
    """The size arguments, for classes that pass them on to the class they extend.

    Attributes:
      height, width: in pixels; those of the image if None. Images are resized to them.
    """

    height: int | None
    width: int | None


class GuidedTextOptions(TextOptions, GuidanceOptions, total=False):
    """:class:`TextOptions` with the guidance argument."""


class ControlTextOptions(TextOptions, ControlOptions, GuidanceOptions, total=False):
    """:class:`TextOptions` and :class:`ControlOptions`."""


class AdapterTextOptions(TextOptions, AdapterOptions, GuidanceOptions, total=False):
    """:class:`TextOptions` and :class:`AdapterOptions`."""


class ControlImageOptions(ControlTextOptions, SizeOptions, StrengthOptions, total=False):
    """:class:`ControlTextOptions`, from an image."""


class InpaintOptions(TypedDict, total=False):
    """Arguments of every call that inpaints, beside the images.

    Attributes:
      masked_image_latents: ``[B,h,w,c]``, the masked image already encoded (inpainting checkpoints only).
      height, width: in pixels; the checkpoint's if None. PIL images are resized to it.
      padding_mask_crop: repaint only the region around the white part of the mask, with this many pixels around it, at
        the full size of the request, and put the result back into the image. Takes one PIL image and mask of the same
        size; for ``output_type="pil"``.
      keep_unmasked: return the pixels of ``image`` unchanged where the mask is black, and mixed where it is gray.
    """

    masked_image_latents: Any
    height: int | None
    width: int | None
    padding_mask_crop: int | None
    keep_unmasked: bool


class InpaintTextOptions(TextOptions, InpaintOptions, total=False):
    """:class:`TextOptions` and :class:`InpaintOptions`."""


class ControlInpaintOptions(InpaintTextOptions, ControlOptions, GuidanceOptions, StrengthOptions, total=False):
    """:class:`InpaintTextOptions` and :class:`ControlOptions`."""


Size = tuple[int, int]


class XLOptions(PooledTextOptions, total=False):
    """Arguments of every call of the SDXL family, besides the prompts for the two encoders.

    Attributes:
      negative_prompt: if None, the unconditional embeddings are zeros if the checkpoint says so
        (``force_zeros_for_empty_prompt``), else those of the empty prompt.
      negative_prompt_2: negative prompt for the second encoder; ``negative_prompt`` if None.
      original_size, target_size: micro-conditioning, (height, width) in pixels; the image size if None.
      crops_coords_top_left: micro-conditioning, (top, left) in pixels; (0, 0) by default.
      negative_original_size, negative_crops_coords_top_left, negative_target_size: micro-conditioning of the
        unconditional branch. In text to image, the conditional branch's values are used unless both negative sizes are
        given. In image to image and inpainting, each size defaults to the conditional branch's; so does the crop,
        except for checkpoints with an aesthetic score, where it defaults to (0, 0).
      aesthetic_score, negative_aesthetic_score: 6.0 and 2.5 by default, for checkpoints that use them (the refiner).
      denoising_end: fraction in (0, 1) of the schedule at which to stop and leave the rest to another model (the
        refiner); pass the result on with ``output_type="latent"``.
    """

    negative_prompt_2: str | Sequence[str] | None
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
    """:class:`XLOptions` and :class:`InpaintOptions`.

    Attributes:
      denoising_start: fraction in (0, 1) of the schedule that another model has already run; ``image`` is then its
        noisy latents ``[B,h,w,c]``, no noise is added, and ``strength`` is ignored.
    """

    denoising_start: float | None


class XLControlTextOptions(XLOptions, ControlOptions, GuidanceOptions, total=False):
    """:class:`XLOptions` and :class:`ControlOptions`."""


class XLControlImageOptions(XLControlTextOptions, SizeOptions, total=False):
    """:class:`XLControlTextOptions`, from an image."""


class XLAdapterTextOptions(XLOptions, AdapterOptions, GuidanceOptions, total=False):
    """:class:`XLOptions` and :class:`AdapterOptions`."""


class XLControlInpaintOptions(XLInpaintOptions, ControlOptions, StrengthOptions, total=False):
    """:class:`XLInpaintOptions` and :class:`ControlOptions`."""


def split_options(options: Mapping[str, Any], kind: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split options into those that the ``TypedDict`` ``kind`` names, and the others."""
    names = kind.__annotations__
    return {k: v for k, v in options.items() if k in names}, {k: v for k, v in options.items() if k not in names}


def check_names(owner: type, given: Mapping[str, Any], known: type) -> None:
    """Check that a pipeline's calls have all the given arguments.

    Args:
      owner: the pipeline's class.
      given: the arguments that its ``compose`` does not name.
      known: a ``TypedDict`` of the valid ones.

    Raises:
      TypeError: an argument is unknown; the message names it and lists the valid ones.
    """
    if unknown := sorted(set(given) - set(known.__annotations__)):
        names = ", ".join(sorted(argument_names(owner)))
        hints = "".join(f"; {INSTEAD[name]}" for name in unknown if name in INSTEAD)
        raise TypeError(f"{owner.__name__} has no argument {', '.join(unknown)}{hints}; it has {names}")


INSTEAD = {
    "generator": 'give seed= (with noise="torch" or noise="cuda", PyTorch\'s noise for that seed)',
    "return_dict": "a call returns an Output, whose images are .images",
    "callback": "give callback_on_step_end=",
    "callback_steps": "callback_on_step_end= is called after every step",
    "callback_on_step_end_tensor_inputs": "callback_on_step_end= gets the latents",
    "prior_callback_on_step_end_tensor_inputs": "prior_callback_on_step_end= gets the latents",
    "cross_attention_kwargs": "give lora_scale= instead of its scale",
}
"""Argument of PyTorch diffusers' calls that ours do not have -> what to do instead."""


def argument_names(owner: type) -> set[str]:
    """All arguments of a pipeline's calls; see :func:`argument_hints`."""
    return set(argument_hints(owner))


def argument_hints(owner: type, compose: Any = None) -> dict[str, Any]:
    """Argument of a pipeline's calls -> annotation, the positional ones first: those that its ``compose`` names, and
    those of the ``TypedDict`` that it unpacks. If it passes on untyped options, those of the class that it extends are
    included.

    Args:
      owner: the pipeline's class.
      compose: what makes the request instead of the class's own.
    """
    return _own_hints(owner) if compose is None else _hints([compose])


@functools.cache  # it is asked for in every call
def _own_hints(owner: type) -> dict[str, Any]:
    return _hints([vars(cls)["compose"] for cls in owner.__mro__ if "compose" in vars(cls)])


def _hints(composes: Sequence[Any]) -> dict[str, Any]:
    """:func:`argument_hints` of the functions that make a request, each of which extends the next."""
    found: dict[str, Any] = {}
    for function in composes:
        _, *parameters = inspect.signature(function).parameters.values()  # without self
        hints: dict[str, Any] = {}
        with contextlib.suppress(NameError, TypeError):  # only type checkers resolve it, or it is a partial function
            hints = typing.get_type_hints(function)
        named = {p.name: hints.get(p.name, Any) for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        rest = next((hints.get(p.name) for p in parameters if p.kind == p.VAR_KEYWORD), ())
        for hints_there in (named, *map(typing.get_type_hints, typing.get_args(rest))):
            found |= {name: hint for name, hint in hints_there.items() if name not in found}
        if rest is not None:
            return found
    return found
