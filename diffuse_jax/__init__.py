"""diffuse_jax: diffusion models, samplers and pipelines for JAX.

Importing the package imports nothing else. A public name is imported from the module that defines it when it is first
used, so ``import diffuse_jax`` takes milliseconds and ``diffuse_jax.DDIMScheduler`` does not load the pipelines.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see; at run time __getattr__ gives the same names
    from diffuse_jax.models import *  # noqa: F403
    from diffuse_jax.pipelines import *  # noqa: F403
    from diffuse_jax.schedulers import *  # noqa: F403
    from diffuse_jax.text import *  # noqa: F403
    from diffuse_jax.utils import load_image, make_image_grid  # noqa: F401

__version__ = "0.1.0"

_PUBLIC = {
    "diffuse_jax.utils": ("load_image", "make_image_grid"),
    "diffuse_jax.models": (
        "ADMUNet",
        "AsymmetricAutoencoderKL",
        "AutoencoderKL",
        "AutoencoderTiny",
        "CLIPVisionModel",
        "CLIPVisionModelWithProjection",
        "ControlNetModel",
        "DPTForDepthEstimation",
        "PriorTransformer",
        "IFSafetyChecker",
        "StableDiffusionSafetyChecker",
        "StableUnCLIPImageNormalizer",
        "ConsistencyDecoderVAE",
        "IPAdapter",
        "PaellaVQModel",
        "T2IAdapter",
        "UnCLIPTextProjModel",
        "UNet2DConditionModel",
        "UNet2DModel",
        "WuerstchenDiffNeXt",
        "WuerstchenPrior",
        "VQModel",
    ),
    "diffuse_jax.pipelines": (
        "AutoPipelineForImage2Image",
        "AutoPipelineForInpainting",
        "AutoPipelineForText2Image",
        "ConsistencyModelPipeline",
        "DDIMPipeline",
        "DDPMPipeline",
        "DiffusionPipeline",
        "KandinskyCombinedPipeline",
        "KandinskyImg2ImgCombinedPipeline",
        "KandinskyImg2ImgPipeline",
        "KandinskyInpaintCombinedPipeline",
        "KandinskyInpaintPipeline",
        "KandinskyPipeline",
        "KandinskyPriorPipeline",
        "KandinskyV22ControlnetImg2ImgPipeline",
        "KandinskyV22ControlnetPipeline",
        "KandinskyV22Img2ImgPipeline",
        "KandinskyV22InpaintPipeline",
        "KandinskyV22Pipeline",
        "KandinskyV22CombinedPipeline",
        "KandinskyV22Img2ImgCombinedPipeline",
        "KandinskyV22InpaintCombinedPipeline",
        "KandinskyV22PriorEmb2EmbPipeline",
        "KandinskyV22PriorPipeline",
        "IFImg2ImgPipeline",
        "IFImg2ImgSuperResolutionPipeline",
        "IFInpaintingPipeline",
        "IFInpaintingSuperResolutionPipeline",
        "IFPipeline",
        "IFSuperResolutionPipeline",
        "KarrasEDMPipeline",
        "KarrasVePipeline",
        "LDMPipeline",
        "LDMSuperResolutionPipeline",
        "LDMTextToImagePipeline",
        "LatentConsistencyModelImg2ImgPipeline",
        "LatentConsistencyModelPipeline",
        "PNDMPipeline",
        "RePaintPipeline",
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
        "UnCLIPImageVariationPipeline",
        "UnCLIPPipeline",
        "WuerstchenCombinedPipeline",
        "WuerstchenDecoderPipeline",
        "WuerstchenPriorPipeline",
        "sample",
    ),
    "diffuse_jax.schedulers": (
        "CMStochasticIterativeScheduler",
        "ConsistencyDecoderScheduler",
        "CosineDPMSolverMultistepScheduler",
        "DDIMInverseScheduler",
        "DDIMParallelScheduler",
        "DDIMScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DDPMWuerstchenScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepInverseScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "HeunDiscreteScheduler",
        "IPNDMScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KarrasDiffusionSchedulers",
        "KarrasEDMScheduler",
        "KarrasVeScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "RePaintScheduler",
        "SASolverScheduler",
        "ScoreSdeVeScheduler",
        "ScoreSdeVpScheduler",
        "TCDScheduler",
        "UnCLIPScheduler",
        "UniPCMultistepScheduler",
        "VQDiffusionScheduler",
    ),
    "diffuse_jax.text": (
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        "LDMBertModel",
        "MultilingualCLIP",
        "T5EncoderModel",
    ),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    """Import ``name`` from its home on first use and remember it."""
    if name not in _HOME:
        raise AttributeError(f"module 'diffuse_jax' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
