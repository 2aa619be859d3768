"""Pipelines: from prompts to pictures in one compiled program."""

from diffuse_jax.pipelines.auto import AutoPipelineForText2Image
from diffuse_jax.pipelines.base import DiffusionPipeline
from diffuse_jax.pipelines.call import CallOptions, TextToImagePipeline
from diffuse_jax.pipelines.run import ImagePipelineOutput
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from diffuse_jax.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline

PIPELINES: dict[str, type[DiffusionPipeline]] = {
    cls.__name__: cls for cls in (StableDiffusionPipeline, StableDiffusionXLPipeline)
}
"""Pipelines by the name in ``model_index.json``."""

__all__ = [
    "PIPELINES",
    "AutoPipelineForText2Image",
    "CallOptions",
    "DiffusionPipeline",
    "ImagePipelineOutput",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "TextToImagePipeline",
]
