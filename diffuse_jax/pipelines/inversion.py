"""Inversion: from an image to the noise that the sampler would make it from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from diffuse_jax.pipelines.family import text_to_image
from diffuse_jax.pipelines.inputs import ImageInput, Prompt, image_sizes
from diffuse_jax.pipelines.options import TextOptions, XLOptions
from diffuse_jax.pipelines.parts.decode import Raw
from diffuse_jax.pipelines.parts.start import FromCleanImage
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.tasks import changed, image_rows, input_size, vae_of
from diffuse_jax.schedulers import DDIMInverseScheduler, Scheduler


def inverting(
    pipe: Any, image: ImageInput, arguments: Mapping[str, Any], *, scheduler: Scheduler | None, strength: float
) -> Request:
    """Run the sampler backwards from ``image``; the result is ``latents [B,h,w,c]``.

    Args:
      pipe: the pipeline.
      image: the image, or one per prompt; or latents ``[B,h,w,c]``.
      arguments: of the call; one prompt is for all images, and without a prompt it is empty.
      scheduler: see :func:`inverse_of`.
      strength: in (0, 1], the share of the steps to run.

    Raises:
      ValueError: the UNet takes more than latents, or the sampler does not run backwards.
      TypeError: an argument has no meaning here.
    """
    for name, why in (("output_type", "the result is latents"), ("latents", "the run starts from image")):
        if arguments.get(name) is not None:
            raise TypeError(f"an inversion takes no {name}: {why}")
    vae, unet = vae_of(pipe), pipe.components["unet"].config
    if unet.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"the UNet has {unet.in_channels} input channels; an inversion needs one that takes latents alone "
            f"({vae.config.latent_channels})"
        )
    size, sampler = input_size(pipe, image, "image"), inverse_of(pipe, scheduler)
    given = {**arguments, "output_type": "latent"}
    if given.get("prompt_embeds") is None and isinstance(given.get("prompt") or "", str):
        given["prompt"] = [given.get("prompt") or ""] * len(image_sizes(image, "image"))
    request = text_to_image(pipe, given, size, scheduler=sampler, strength=strength)
    return changed(request, image_rows(request, pipe, image, "image"), start=FromCleanImage(vae), decode=Raw("latents"))


def inverse_of(pipe: Any, scheduler: Scheduler | None) -> Scheduler:
    """A sampler that runs from an image to noise: the given one, else the pipeline's ``inverse_scheduler``, else
    :class:`~diffuse_jax.schedulers.DDIMInverseScheduler` with the training schedule of the pipeline's sampler.

    Raises:
      ValueError: it runs from noise to an image, or the pipeline's sampler has another kind of schedule.
    """
    found = pipe.components.get("inverse_scheduler") if scheduler is None else scheduler
    if found is None:
        if "beta_schedule" not in pipe.scheduler.to_json():
            raise ValueError(
                f"{type(pipe.scheduler).__name__} has no schedule of betas to invert; give scheduler=, for example a "
                "DDIMInverseScheduler with the schedule that the network was trained on"
            )
        return DDIMInverseScheduler.from_config(pipe.scheduler, clip_sample=False)
    if not isinstance(found, Scheduler) or not found.ascends:
        raise ValueError(
            f"{type(found).__name__} does not run from an image to noise; give a DDIMInverseScheduler or a "
            "DPMSolverMultistepInverseScheduler"
        )
    return found


def invert(
    pipe: Any,
    image: ImageInput = None,
    prompt: Prompt | None = None,
    *,
    scheduler: Scheduler | None = None,
    strength: float = 1.0,
    guidance_scale: float | Sequence[float] = 1.0,
    **options: Unpack[TextOptions],
) -> Request:
    """Find the noise that an image would be sampled from, by running the sampler backwards (DDIM inversion).

    ``out.latents`` is float32 ``[B,h,w,c]``, which a call takes as ``latents=``; with ``return_trajectory``,
    ``out.trajectory [B,steps + 1,h,w,c]`` begins with the image's latents. Use the same prompt and number of steps to
    get the image back, with ``DDIMScheduler``. Arguments of calls (``modifiers``, ``seed``, ``lora_scale`` ...) have
    the same meaning.

    Args:
      image: the image, or one per prompt; or latents ``[B,h,w,c]``. It is encoded as a sample of the autoencoder's
        posterior.
      prompt: what the image shows, one for all images or one for each; empty if None.
      scheduler: a sampler that runs backwards; the pipeline's ``inverse_scheduler`` or a ``DDIMInverseScheduler`` like
        the pipeline's sampler if None.
      strength: in (0, 1], the share of the steps to run, the first ones from the image.
      guidance_scale: one value, or one per image. Above 1, the inversion is less exact.
      **options: see :class:`~diffuse_jax.pipelines.options.TextOptions`.

    Raises:
      ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
    """
    arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
    return inverting(pipe, image, arguments, scheduler=scheduler, strength=strength)


def invert_xl(
    pipe: Any,
    image: ImageInput = None,
    prompt: Prompt | None = None,
    prompt_2: Prompt | None = None,
    *,
    scheduler: Scheduler | None = None,
    strength: float = 1.0,
    guidance_scale: float | Sequence[float] = 1.0,
    **options: Unpack[XLOptions],
) -> Request:
    """Find the noise that an image would be sampled from; see :meth:`StableDiffusionPipeline.invert
    <diffuse_jax.pipelines.StableDiffusionPipeline.invert>`.

    Args:
      image, prompt, scheduler, strength, guidance_scale: as there.
      prompt_2: prompt for the second text encoder; ``prompt`` if None.
      **options: see :class:`~diffuse_jax.pipelines.options.XLOptions`.
    """
    arguments = {"prompt": prompt, "prompt_2": prompt_2, "guidance_scale": guidance_scale, **options}
    return inverting(pipe, image, arguments, scheduler=scheduler, strength=strength)
