"""One name for a task, whatever the architecture of the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from diffuse_jax import weights
from diffuse_jax.pipelines.pipeline import PIPELINES, DiffusionPipeline

FAMILIES = {
    "StableDiffusion": "StableDiffusion",
    "StableDiffusionImg2Img": "StableDiffusion",
    "StableDiffusionInpaint": "StableDiffusion",
    "StableDiffusionControlNet": "StableDiffusion",
    "StableDiffusionControlNetImg2Img": "StableDiffusion",
    "StableDiffusionControlNetInpaint": "StableDiffusion",
    "LatentConsistencyModel": "StableDiffusion",
    "StableDiffusionXL": "StableDiffusionXL",
    "StableDiffusionXLImg2Img": "StableDiffusionXL",
    "StableDiffusionXLInpaint": "StableDiffusionXL",
}
"""Class in ``model_index.json`` -> what its family's classes begin with; both without ``Pipeline``."""


class AutoPipeline:
    """Base of the classes below, which differ in their task."""

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
        return cls.pipeline_for(weights.read_index(folder).class_name, source).from_pretrained(folder, **options)

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline, **components: Any) -> DiffusionPipeline:
        """The task's pipeline with the components of another one: the same buffers, no copy.

        Raises:
          WeightsError: the architecture has no such task.
        """
        return cls.pipeline_for(type(pipe).__name__, "this pipeline").from_pipe(pipe, **components)

    @classmethod
    def pipeline_for(cls, name: str, source: Any) -> type[DiffusionPipeline]:
        """The class for this task and the architecture that a pipeline's class name stands for."""
        family = FAMILIES.get(name.removesuffix("Pipeline"))
        if family is None:
            known = ", ".join(f"{k}Pipeline" for k in FAMILIES)
            raise weights.WeightsError(f"{source}: {name} has no {cls.__name__}; known: {known}")
        return PIPELINES[f"{family}{cls.task}Pipeline"]


class AutoPipelineForText2Image(AutoPipeline):
    """Opens any checkpoint that makes images from text, also one that was saved for another task."""

    task = ""


class AutoPipelineForImage2Image(AutoPipeline):
    """Opens any checkpoint for image to image."""

    task = "Img2Img"


class AutoPipelineForInpainting(AutoPipeline):
    """Opens any checkpoint for inpainting."""

    task = "Inpaint"
