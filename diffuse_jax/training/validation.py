"""Validation images of latent text-to-image models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffuse_jax.models import Params
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.training.families import trained_family
from diffuse_jax.training.latent import sample_images
from diffuse_jax.training.latent_model import source_folder
from diffuse_jax.training.settings import ModelSettings, ValidationSettings
from diffuse_jax.utils import load_image


def validation_from(
    settings: ValidationSettings,
    model: ModelSettings,
    pipe: DiffusionPipeline,
    merged: Callable[[Any], Mapping[str, Params]],
    seed: int = 0,
    images: Sequence[Any] | None = None,
    sampler: Scheduler | None = None,
) -> Callable[[Any], list[tuple[str, Any]]] | None:
    """A function that generates validation images, for :func:`~diffuse_jax.training.loop.fit`; None without a prompt.

    Args:
      settings: prompts, number of images and sampling options.
      model: the model whose sampler is used.
      pipe: the pipeline whose networks, tokenizers and frozen parameters are used; that of
        :func:`~diffuse_jax.training.latent_model.configured_from` is enough to check the other arguments.
      merged: maps trained parameters to the parameters of the networks that they change.
      seed: seed of the images; the noise is the same at every validation.
      images: what the pipeline takes as ``image``, for each prompt; None if it takes none.
      sampler: in place of the model's.

    Raises:
      ValueError: the sampler does not support this number of steps, or super-resolution has no images.
    """
    if not settings.validation_prompt:
        return None
    prompts = settings.validation_prompt
    if sampler is None:
        sampler = Scheduler.from_pretrained(source_folder(model, only_small=True), subfolder="scheduler")
        sampler = trained_family(pipe).sampler(sampler, pipe.scheduler)
    if settings.validation_images:
        images = [load_image(str(path)) for path in settings.validation_images]
    if images is None and "image_noising_scheduler" in pipe.components:
        raise ValueError("--validation_prompt needs --validation_images here: what super-resolution is to enlarge")
    given = {} if images is None else {"image": list(images)}
    sampler.plan(settings.validation_inference_steps)  # raises here instead of at the first validation

    def validate(trained: Any) -> list[tuple[str, Any]]:
        changed = {name: (pipe.components[name], params) for name, params in merged(trained).items()}
        return sample_images(
            pipe.replace(scheduler=sampler, **changed),
            prompts,
            num_images_per_prompt=settings.num_validation_images,
            num_inference_steps=settings.validation_inference_steps,
            guidance_scale=settings.validation_guidance_scale,
            seed=seed,
            **given,
        )

    return validate
