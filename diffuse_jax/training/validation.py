"""Validation images of latent text-to-image models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffuse_jax.models import Params
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.training.latent import sample_pictures
from diffuse_jax.training.latent_model import source_folder
from diffuse_jax.training.settings import ModelSettings, ValidationSettings


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
