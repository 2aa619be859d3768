"""Pipelines: from prompts to pictures in one compiled program."""

from diffuse_jax.pipelines.auto import AutoPipelineForText2Image
from diffuse_jax.pipelines.base import DiffusionPipeline
from diffuse_jax.pipelines.run import ImagePipelineOutput
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from diffuse_jax.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from diffuse_jax.pipelines.unconditional import DDIMPipeline, DDPMPipeline

PIPELINES: dict[str, type[DiffusionPipeline]] = {
    cls.__name__: cls for cls in (StableDiffusionPipeline, StableDiffusionXLPipeline, DDPMPipeline, DDIMPipeline)
}
"""Pipelines by the name in ``model_index.json``."""

__all__ = [
    "AutoPipelineForText2Image",
    "DDIMPipeline",
    "DDPMPipeline",
    "DiffusionPipeline",
    "ImagePipelineOutput",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
]
