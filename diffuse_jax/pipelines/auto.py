"""One name for a task, whatever the architecture of the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffuse_jax import weights
from diffuse_jax.pipelines.base import DiffusionPipeline
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from diffuse_jax.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline

TEXT_TO_IMAGE: dict[str, type[DiffusionPipeline]] = {
    "StableDiffusion": StableDiffusionPipeline,
    "StableDiffusionImg2Img": StableDiffusionPipeline,
    "StableDiffusionInpaint": StableDiffusionPipeline,
    "LatentConsistencyModel": StableDiffusionPipeline,
    "StableDiffusionXL": StableDiffusionXLPipeline,
    "StableDiffusionXLImg2Img": StableDiffusionXLPipeline,
    "StableDiffusionXLInpaint": StableDiffusionXLPipeline,
}
"""Class in ``model_index.json``, without ``Pipeline`` -> the class that makes pictures from text with it."""


class AutoPipelineForText2Image:
    """Opens any checkpoint that can make pictures from text, also one that was saved for another task."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> DiffusionPipeline:
        """As :meth:`DiffusionPipeline.from_pretrained`, with the class chosen by the checkpoint's architecture.

        Raises:
          WeightsError: there is no such checkpoint, or its architecture makes no pictures from text.
        """
        hub = ("revision", "local_files_only", "token", "cache_dir", "variant")
        folder = weights.resolve(source, **{k: v for k, v in options.items() if k in hub})
        name = weights.read_index(folder).class_name
        target = TEXT_TO_IMAGE.get(name.removesuffix("Pipeline"))
        if target is None:
            known = ", ".join(f"{k}Pipeline" for k in TEXT_TO_IMAGE)
            raise weights.WeightsError(f"{source}: {name} cannot make pictures from text; known: {known}")
        return target.from_pretrained(folder, **options)
