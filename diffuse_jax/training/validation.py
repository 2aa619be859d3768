"""Validation images of latent text-to-image models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from diffuse_jax.models import Params
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.training.checks import at_least
from diffuse_jax.training.latent import sample_pictures
from diffuse_jax.training.latent_model import ModelSettings, source_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """Which images show how far a training is.

    Attributes:
      validation_prompt: prompts of the images; None for no images.
      num_validation_images: images per prompt.
      validation_inference_steps: sampling steps of an image.
      validation_guidance_scale: guidance of an image.

    Raises:
      ValueError: there are prompts, but no image of any is wanted.
    """

    validation_prompt: tuple[str, ...] | None = None
    num_validation_images: int = 4
    validation_inference_steps: int = 25
    validation_guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        if self.validation_prompt:
            at_least(1, num_validation_images=self.num_validation_images)


def validation_from(
    settings: ValidationSettings,
    model: ModelSettings,
    pipe: DiffusionPipeline,
    merged: Callable[[Any], Mapping[str, Params]],
    seed: int = 0,
) -> Callable[[Any], list[tuple[str, Any]]] | None:
    """Makes the validation images, as :func:`~diffuse_jax.training.loop.fit` takes it; None where there is no prompt.

    Args:
      settings: which images.
      model: where the sampler comes from.
      pipe: its networks, tokenizers and frozen parameters are used.
      merged: trained parameters -> parameters of the networks that they change.
      seed: of the images; the same noise every time.

    Raises:
      ValueError: images cannot be made in so many steps.
    """
    if not settings.validation_prompt:
        return None
    prompts = settings.validation_prompt
    sampler = Scheduler.from_pretrained(source_folder(model), subfolder="scheduler")
    sampler = sampler.replace(prediction_type=pipe.scheduler.prediction_type)
    sampler.plan(settings.validation_inference_steps)  # what it refuses would else end the run at its first pictures

    def validate(trained: Any) -> list[tuple[str, Any]]:
        changed = {name: (pipe.components[name], params) for name, params in merged(trained).items()}
        return sample_pictures(
            pipe.replace(scheduler=sampler, **changed),
            prompts,
            num_images_per_prompt=settings.num_validation_images,
            num_inference_steps=settings.validation_inference_steps,
            guidance_scale=settings.validation_guidance_scale,
            seed=seed,
        )

    return validate
