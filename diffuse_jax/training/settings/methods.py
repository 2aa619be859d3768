"""The settings of the methods of training: the loss, validation, and what a model is taught."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from diffuse_jax.bounds import COUNT, NATURAL, NONNEGATIVE, PORTION, POSITIVE
from diffuse_jax.training.checks import Checked, one_of

TIMESTEP_BIASES = ("none", "earlier", "later", "range")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveSettings(Checked):
    """The part of an :class:`~diffuse_jax.training.objective.Objective` that does not depend on the model.

    Attributes:
      snr_gamma, noise_offset, input_perturbation: see there.
      timestep_bias_strategy, timestep_bias_multiplier, timestep_bias_portion, timestep_bias_begin, timestep_bias_end:
        which timesteps are drawn more often, see
        :func:`~diffuse_jax.training.objective.timestep_probabilities`.

    Raises:
      ValueError: ``snr_gamma`` is not positive, or the strategy is not known.
    """

    snr_gamma: Annotated[float, POSITIVE] | None = None
    noise_offset: Annotated[float, NONNEGATIVE] = 0.0
    input_perturbation: Annotated[float, NONNEGATIVE] = 0.0
    timestep_bias_strategy: str = "none"
    timestep_bias_multiplier: Annotated[float, POSITIVE] = 1.0
    timestep_bias_portion: Annotated[float, PORTION] = 0.25
    timestep_bias_begin: Annotated[int, NATURAL] = 0
    timestep_bias_end: Annotated[int, COUNT] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(TIMESTEP_BIASES, timestep_bias_strategy=self.timestep_bias_strategy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationSettings(Checked):
    """Which images show how far a training is.

    Attributes:
      validation_prompt: prompts of the images; None for no images.
      num_validation_images: images per prompt.
      validation_inference_steps: sampling steps of an image.
      validation_guidance_scale: guidance of an image.

    Raises:
      ValueError: a number is out of its range.
    """

    validation_prompt: tuple[str, ...] | None = None
    num_validation_images: Annotated[int, COUNT] = 4
    validation_inference_steps: Annotated[int, COUNT] = 25
    validation_guidance_scale: Annotated[float, NONNEGATIVE] = 7.5


OTHER_DATA = (
    "train_data_dir",
    "dataset_name",
    "dataset_config_name",
    "train_shards",
    "load_from_disk",
    "streaming",
    "max_train_samples",
)
"""Settings of data that have no use where all images come from one folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DreamBoothSettings(Checked):
    """The instance that a model is taught, and the class that it must not forget.

    Attributes:
      instance_data_dir: folder with pictures of the instance; no captions are needed.
      instance_prompt: a prompt with a rare word for it, such as "a photo of sks dog".
      with_prior_preservation: train on pictures of the class too.
      prior_loss_weight: how much those count.
      class_data_dir: folder with pictures of the class; missing ones are made by the model.
      class_prompt: a prompt of the class, such as "a photo of dog".
      num_class_images: how many pictures of the class there must be.
      sample_batch_size: how many of them are made at once.

    Raises:
      ValueError: prior preservation without a folder and a prompt of the class, or counts that are not positive.
    """

    instance_data_dir: str | Path
    instance_prompt: str
    with_prior_preservation: bool = False
    prior_loss_weight: Annotated[float, NONNEGATIVE] = 1.0
    class_data_dir: str | Path | None = None
    class_prompt: str | None = None
    num_class_images: Annotated[int, COUNT] = 100
    sample_batch_size: Annotated[int, COUNT] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = [name for name in ("class_data_dir", "class_prompt") if getattr(self, name) is None]
        if self.with_prior_preservation and missing:
            raise ValueError(f"--with_prior_preservation needs --{' and --'.join(missing)}")


_LOOKS = ("", "good ", "bright ", "dark ", "clear ", "blurred ", "cropped ", "close-up ", "small ")


_SIZES = ("", "small ", "large ", "dark ", "bright ", "detailed ")


TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "object": tuple(f"a {look}photo of {which} {{}}" for look in _LOOKS for which in ("a", "the", "my")),
    "style": (
        "a work in the style of {}",
        *(f"a {size}{work} in the style of {{}}" for size in _SIZES for work in ("painting", "drawing", "picture")),
    ),
}
"""Prompts by what is learned; ``{}`` stands for the new word. Many neutral ones keep it from meaning one sentence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InversionSettings(Checked):
    """A new word, where its meaning starts, and the prompts that it is learned with.

    Attributes:
      placeholder_token: the new word, such as "<cat-toy>".
      initializer_token: a word of one token whose meaning is the start.
      num_vectors: rows of the table that the word stands for.
      learnable_property: which prompts are used, a key of :data:`TEMPLATES`.
      caption_column: instead of those, captions of ``metadata.jsonl``, in which ``{}`` stands for the word.
      repeats: how often a picture counts in an epoch.
      save_as_full_pipeline: write the whole pipeline with the new word too.

    Raises:
      ValueError: a count is not positive, or there are no prompts for the property.
    """

    placeholder_token: str
    initializer_token: str
    num_vectors: Annotated[int, COUNT] = 1
    learnable_property: str = "object"
    caption_column: str | None = None
    repeats: Annotated[int, COUNT] = 100
    save_as_full_pipeline: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(TEMPLATES, learnable_property=self.learnable_property)
