"""Pipelines: methods composed of parts, from a request to images in one compiled program."""

from diffuse_jax.pipelines.auto import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
)
from diffuse_jax.pipelines.catalogue import register
from diffuse_jax.pipelines.latent_consistency import (
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
)
from diffuse_jax.pipelines.latent_diffusion import LDMPipeline
from diffuse_jax.pipelines.method import Method, Net, Part, PlainStep, Step, draw, sample
from diffuse_jax.pipelines.perturbed import (
    StableDiffusionControlNetPAGInpaintPipeline,
    StableDiffusionControlNetPAGPipeline,
    StableDiffusionPAGImg2ImgPipeline,
    StableDiffusionPAGInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLControlNetPAGImg2ImgPipeline,
    StableDiffusionXLControlNetPAGPipeline,
    StableDiffusionXLPAGImg2ImgPipeline,
    StableDiffusionXLPAGInpaintPipeline,
    StableDiffusionXLPAGPipeline,
)
from diffuse_jax.pipelines.pipeline import PIPELINES, DiffusionPipeline
from diffuse_jax.pipelines.repaint import RePaintPipeline
from diffuse_jax.pipelines.running import Output, Request, run
from diffuse_jax.pipelines.score_based import KarrasVePipeline, ScoreSdeVePipeline
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from diffuse_jax.pipelines.stable_diffusion_adapter import StableDiffusionAdapterPipeline
from diffuse_jax.pipelines.stable_diffusion_controlnet import StableDiffusionControlNetPipeline
from diffuse_jax.pipelines.stable_diffusion_controlnet_img2img import StableDiffusionControlNetImg2ImgPipeline
from diffuse_jax.pipelines.stable_diffusion_controlnet_inpaint import StableDiffusionControlNetInpaintPipeline
from diffuse_jax.pipelines.stable_diffusion_depth2img import StableDiffusionDepth2ImgPipeline
from diffuse_jax.pipelines.stable_diffusion_diffedit import StableDiffusionDiffEditPipeline
from diffuse_jax.pipelines.stable_diffusion_image_variation import StableDiffusionImageVariationPipeline
from diffuse_jax.pipelines.stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from diffuse_jax.pipelines.stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffuse_jax.pipelines.stable_diffusion_instruct_pix2pix import StableDiffusionInstructPix2PixPipeline
from diffuse_jax.pipelines.stable_diffusion_latent_upscale import StableDiffusionLatentUpscalePipeline
from diffuse_jax.pipelines.stable_diffusion_panorama import StableDiffusionPanoramaPipeline
from diffuse_jax.pipelines.stable_diffusion_sag import StableDiffusionSAGPipeline
from diffuse_jax.pipelines.stable_diffusion_upscale import StableDiffusionUpscalePipeline
from diffuse_jax.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from diffuse_jax.pipelines.stable_diffusion_xl_adapter import StableDiffusionXLAdapterPipeline
from diffuse_jax.pipelines.stable_diffusion_xl_controlnet import StableDiffusionXLControlNetPipeline
from diffuse_jax.pipelines.stable_diffusion_xl_controlnet_img2img import StableDiffusionXLControlNetImg2ImgPipeline
from diffuse_jax.pipelines.stable_diffusion_xl_controlnet_inpaint import StableDiffusionXLControlNetInpaintPipeline
from diffuse_jax.pipelines.stable_diffusion_xl_img2img import StableDiffusionXLImg2ImgPipeline
from diffuse_jax.pipelines.stable_diffusion_xl_inpaint import StableDiffusionXLInpaintPipeline
from diffuse_jax.pipelines.stable_diffusion_xl_instruct_pix2pix import StableDiffusionXLInstructPix2PixPipeline
from diffuse_jax.pipelines.unconditional import (
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDPMPipeline,
    KarrasEDMPipeline,
    PNDMPipeline,
)

__all__ = [
    "PIPELINES",
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "ConsistencyModelPipeline",
    "DDIMPipeline",
    "DDPMPipeline",
    "DiffusionPipeline",
    "KarrasEDMPipeline",
    "KarrasVePipeline",
    "LDMPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "Method",
    "Net",
    "Output",
    "PNDMPipeline",
    "Part",
    "PlainStep",
    "RePaintPipeline",
    "Request",
    "ScoreSdeVePipeline",
    "StableDiffusionAdapterPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionControlNetPAGInpaintPipeline",
    "StableDiffusionControlNetPAGPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionDiffEditPipeline",
    "StableDiffusionImageVariationPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionLatentUpscalePipeline",
    "StableDiffusionPAGImg2ImgPipeline",
    "StableDiffusionPAGInpaintPipeline",
    "StableDiffusionPAGPipeline",
    "StableDiffusionPanoramaPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionSAGPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionXLAdapterPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline",
    "StableDiffusionXLPAGInpaintPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLPipeline",
    "Step",
    "draw",
    "register",
    "run",
    "sample",
]
