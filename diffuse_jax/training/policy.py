"""How a model that is tuned to a reward samples its images, and of which prompts.

Training samples with the pipeline's own method, guidance included: by :func:`~diffuse_jax.sample` and
:func:`~diffuse_jax.pipelines.rollout.rollout`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.models import Params
from diffuse_jax.pipelines import DiffusionPipeline, Method
from diffuse_jax.pipelines.parts.adapted import LORA, adapted
from diffuse_jax.pipelines.rollout import check_policy
from diffuse_jax.schedulers import DDIMScheduler
from diffuse_jax.schedulers.plan import Plan
from diffuse_jax.training.data import DataSettings, source_from
from diffuse_jax.training.families import trained_family
from diffuse_jax.training.settings import RewardSettings


@dataclasses.dataclass(frozen=True)
class Policy:
    """How images are sampled while a model is tuned.

    Attributes:
      method: the pipeline's, whose UNet takes low-rank pairs if these are trained.
      plan: of DDIM.
      evaluations: the number of evaluations.
      rows: ``(prompts, seeds) -> rows`` of a request.
      combine: ``(trainable, frozen) -> params`` of the method.
    """

    method: Method
    plan: Plan
    evaluations: int
    rows: Callable[[Sequence[str], Sequence[int]], Any]
    combine: Callable[[Params, Params], Params]


def image_size(settings: RewardSettings, pipe: DiffusionPipeline) -> tuple[int, int]:
    """(height, width) of the images.

    Raises:
      ValueError: the resolution is not a multiple of what the model takes, or it is missing and the model has none.
    """
    family = trained_family(pipe)
    if settings.resolution is None:
        if (size := family.size(pipe)) is None:
            raise ValueError("the model does not say how large its images are: give --resolution")
        return size
    if settings.resolution % family.multiple(pipe):
        raise ValueError(f"--resolution must be a multiple of {family.multiple(pipe)}, got {settings.resolution}")
    return settings.resolution, settings.resolution


def policy_from(settings: RewardSettings, pipe: DiffusionPipeline) -> Policy:
    """The policy of a pipeline; the shapes of its parameters are enough.

    Raises:
      ValueError: the model does not have so many steps or this size, or makes images from others.
    """
    if {"image", "mask_image"} & {*inspect.signature(type(pipe).__call__).parameters}:
        raise ValueError(
            f"a {type(pipe).__name__} makes images from other images; rewards are of images from prompts alone: give a "
            "checkpoint for text to image"
        )
    height, width = image_size(settings, pipe)
    # Latents are not confined to [-1, 1], which is what files of samplers without this option leave to the default.
    pipe = pipe.replace(scheduler=DDIMScheduler.from_config(pipe.scheduler, clip_sample=False))
    given: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_inference_steps": settings.sample_num_steps,
        "guidance_scale": settings.sample_guidance_scale,
        "eta": settings.sample_eta,
        "output_type": "np",
    }
    make = lambda prompts, seeds: pipe.request(list(prompts), seed=[int(s) for s in seeds], **given)
    request = make([""], [0])
    method, combine = request.method, with_trained
    if settings.use_lora:
        name = trained_family(pipe).denoiser
        method, combine = dataclasses.replace(method, denoiser=adapted(method.denoiser, (name,))), with_pairs
    if settings.method == "ddpo":
        check_policy(method, request.plan)
    evaluations = int(request.plan.num_evaluations)
    return Policy(method, request.plan, evaluations, lambda prompts, seeds: make(prompts, seeds).rows, combine)


def with_trained(trainable: Params, frozen: Params) -> Params:
    """Trained networks in the place of those of the same names."""
    return {**frozen, **trainable}


def with_pairs(trainable: Params, frozen: Params) -> Params:
    """Trained low-rank pairs beside frozen networks."""
    return {**frozen, LORA: trainable}


def prompts_from(file: str | Path | None, data: DataSettings, read: Callable[..., Any]) -> list[str]:
    """The prompts of a file, or the captions of a data set.

    Args:
      file: the file; None for the data set.
      data: names the data set, if any.
      read: :func:`diffuse_jax.batch.lines.lines_of`.

    Raises:
      ValueError: both or none are given, a row is no prompt or has settings of its own, there are none, or a setting of
        data sets is given with a file.
      FileNotFoundError: there is no such file.
    """
    named = [f"--{name}" for name in ("train_data_dir", "dataset_name") if getattr(data, name)]
    if (file is not None) + len(named) != 1:
        given = [*(["--prompts"] if file is not None else []), *named]
        raise ValueError(
            f"give one of --prompts, --train_data_dir, --dataset_name; got {' and '.join(given) or 'none'}"
        )
    if file is None:
        source = source_from(data)
        captions = [text for k in range(len(source)) for text in source[k].captions]
        if not any(captions):
            raise ValueError(f"{named[0]} has no captions that could be prompts")
        return captions
    for name in ("dataset_config_name", "image_column", "caption_column"):
        if getattr(data, name) != getattr(DataSettings, name):
            raise ValueError(f"--{name} is about a data set; leave it out with --prompts")
    lines, found = read(file, ("prompt",)), []
    for number, raw in lines.rows():
        try:
            fields = dict(lines.fields(raw))
            if [*fields] != ["prompt"] or not isinstance(fields["prompt"], str):
                raise ValueError(f"it must have a prompt and nothing else, got {', '.join(fields) or 'nothing'}")
        except ValueError as error:
            raise ValueError(f"{lines.name}, row {number}: {error}") from None
        found.append(fields["prompt"])
    if not found:
        raise ValueError(f"{lines.name} has no prompts")
    return found


def chosen(prompts: Sequence[str], rng: np.random.Generator, count: int) -> tuple[list[str], list[int]]:
    """Random prompts, and a seed for each image."""
    return [prompts[k] for k in rng.integers(len(prompts), size=count)], rng.integers(2**32, size=count).tolist()
