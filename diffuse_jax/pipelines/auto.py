"""One name for a task, whatever the architecture of the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from diffuse_jax import weights
from diffuse_jax.pipelines.pipeline import PIPELINES, DiffusionPipeline, pipeline_class

NAME = re.compile("(StableDiffusion|StableDiffusionXL|LatentConsistencyModel)(ControlNet|)(Img2Img|Inpaint|)Pipeline")
"""Classes in ``model_index.json`` that have a task: family, control and the task that the folder was saved for."""
SHARED = {"LatentConsistencyModel": "StableDiffusion"}
"""Families whose checkpoints another family's classes run."""


class AutoPipeline:
    """Base of the classes below, which differ in their task.

    A checkpoint or pipeline with a ControlNet, or one that is given ``controlnet=``, opens with the task's ControlNet
    class; ``controlnet=None`` leaves the ControlNet out.
    """

    task: ClassVar[str]
    """What the classes of a task have between family and ``Pipeline``."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> DiffusionPipeline:
        """As :meth:`DiffusionPipeline.from_pretrained`, with the class chosen by the checkpoint's architecture.

        Raises:
          WeightsError: there is no such checkpoint, or its architecture has no such task.
        """
        hub = ("revision", "local_files_only", "token", "cache_dir", "variant")
        folder = weights.resolve(source, **{k: v for k, v in options.items() if k in hub})
        target = cls.pipeline_for(weights.read_index(folder).class_name, source, options)
        return target.from_pretrained(folder, **options)

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline, **components: Any) -> DiffusionPipeline:
        """The task's pipeline with the components of another one: the same buffers, no copy.

        Raises:
          WeightsError: the architecture has no such task.
        """
        return cls.pipeline_for(type(pipe).__name__, "this pipeline", components).from_pipe(pipe, **components)

    @classmethod
    def pipeline_for(cls, name: str, source: Any, given: Mapping[str, Any]) -> type[DiffusionPipeline]:
        """The class for this task, for the architecture that a class name stands for, with or without a ControlNet."""
        found = NAME.fullmatch(name)
        if found is None:
            known = ", ".join(k for k in sorted(PIPELINES) if NAME.fullmatch(k))
            raise weights.WeightsError(f"{source}: {name} has no {cls.__name__}; known: {known}")
        family, control, _ = found.groups()
        has_control = given["controlnet"] is not None if "controlnet" in given else bool(control)
        return pipeline_class(
            f"{SHARED.get(family, family)}{'ControlNet' if has_control else ''}{cls.task}Pipeline", source
        )


class AutoPipelineForText2Image(AutoPipeline):
    """Opens any checkpoint that makes images from text, also one that was saved for another task."""

    task = ""


class AutoPipelineForImage2Image(AutoPipeline):
    """Opens any checkpoint for image to image."""

    task = "Img2Img"


class AutoPipelineForInpainting(AutoPipeline):
    """Opens any checkpoint for inpainting."""

    task = "Inpaint"
