"""Pipelines: methods composed of parts, from a request to images in one compiled program."""

from diffuse_jax.pipelines.auto import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
)
from diffuse_jax.pipelines.catalogue import register
from diffuse_jax.pipelines.deepfloyd_if import IFImg2ImgPipeline, IFInpaintingPipeline, IFPipeline, PromptEmbeds
from diffuse_jax.pipelines.deepfloyd_if_superresolution import (
    IFImg2ImgSuperResolutionPipeline,
    IFInpaintingSuperResolutionPipeline,
    IFSuperResolutionPipeline,
)
from diffuse_jax.pipelines.kandinsky import KandinskyPipeline
from diffuse_jax.pipelines.kandinsky_combined import (
    KandinskyCombinedPipeline,
    KandinskyImg2ImgCombinedPipeline,
    KandinskyInpaintCombinedPipeline,
)
from diffuse_jax.pipelines.kandinsky_img2img import KandinskyImg2ImgPipeline
from diffuse_jax.pipelines.kandinsky_inpaint import KandinskyInpaintPipeline
from diffuse_jax.pipelines.kandinsky_prior import KandinskyPriorPipeline
from diffuse_jax.pipelines.kandinsky_v22 import KandinskyV22Pipeline
from diffuse_jax.pipelines.kandinsky_v22_combined import (
    KandinskyV22CombinedPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22InpaintCombinedPipeline,
)
from diffuse_jax.pipelines.kandinsky_v22_controlnet import KandinskyV22ControlnetPipeline
from diffuse_jax.pipelines.kandinsky_v22_controlnet_img2img import KandinskyV22ControlnetImg2ImgPipeline
from diffuse_jax.pipelines.kandinsky_v22_img2img import KandinskyV22Img2ImgPipeline
from diffuse_jax.pipelines.kandinsky_v22_inpaint import KandinskyV22InpaintPipeline
from diffuse_jax.pipelines.kandinsky_v22_prior import KandinskyV22PriorPipeline
from diffuse_jax.pipelines.kandinsky_v22_prior_emb2emb import KandinskyV22PriorEmb2EmbPipeline
from diffuse_jax.pipelines.latent_consistency import (
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
)
from diffuse_jax.pipelines.latent_diffusion import LDMPipeline, LDMSuperResolutionPipeline
from diffuse_jax.pipelines.latent_diffusion_text import LDMTextToImagePipeline
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
from diffuse_jax.pipelines.stable_unclip import StableUnCLIPPipeline
from diffuse_jax.pipelines.stable_unclip_img2img import StableUnCLIPImg2ImgPipeline
from diffuse_jax.pipelines.unclip import UnCLIPPipeline
from diffuse_jax.pipelines.unclip_image_variation import UnCLIPImageVariationPipeline
from diffuse_jax.pipelines.unconditional import (
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDPMPipeline,
    KarrasEDMPipeline,
    PNDMPipeline,
)
from diffuse_jax.pipelines.wuerstchen_combined import WuerstchenCombinedPipeline
from diffuse_jax.pipelines.wuerstchen_decoder import WuerstchenDecoderPipeline
from diffuse_jax.pipelines.wuerstchen_prior import WuerstchenPriorPipeline

__all__ = [
    "PIPELINES",
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "ConsistencyModelPipeline",
    "DDIMPipeline",
    "DDPMPipeline",
    "DiffusionPipeline",
    "IFImg2ImgPipeline",
    "IFImg2ImgSuperResolutionPipeline",
    "IFInpaintingPipeline",
    "IFInpaintingSuperResolutionPipeline",
    "IFPipeline",
    "IFSuperResolutionPipeline",
    "KandinskyCombinedPipeline",
    "KandinskyImg2ImgCombinedPipeline",
    "KandinskyImg2ImgPipeline",
    "KandinskyInpaintCombinedPipeline",
    "KandinskyInpaintPipeline",
    "KandinskyPipeline",
    "KandinskyPriorPipeline",
    "KandinskyV22CombinedPipeline",
    "KandinskyV22ControlnetImg2ImgPipeline",
    "KandinskyV22ControlnetPipeline",
    "KandinskyV22Img2ImgCombinedPipeline",
    "KandinskyV22Img2ImgPipeline",
    "KandinskyV22InpaintCombinedPipeline",
    "KandinskyV22InpaintPipeline",
    "KandinskyV22Pipeline",
    "KandinskyV22PriorEmb2EmbPipeline",
    "KandinskyV22PriorPipeline",
    "KarrasEDMPipeline",
    "KarrasVePipeline",
    "LDMPipeline",
    "LDMSuperResolutionPipeline",
    "LDMTextToImagePipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "Method",
    "Net",
    "Output",
    "PNDMPipeline",
    "Part",
    "PlainStep",
    "PromptEmbeds",
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
    "StableUnCLIPImg2ImgPipeline",
    "StableUnCLIPPipeline",
    "Step",
    "UnCLIPImageVariationPipeline",
    "UnCLIPPipeline",
    "WuerstchenCombinedPipeline",
    "WuerstchenDecoderPipeline",
    "WuerstchenPriorPipeline",
    "draw",
    "register",
    "run",
    "sample",
]
