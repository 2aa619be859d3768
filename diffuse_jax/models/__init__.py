"""Networks as Flax Linen modules: pure functions of a parameter dict, channel-last."""

from diffuse_jax.models.adm_unet import ADMUNet, ADMUNetConfig
from diffuse_jax.models.autoencoder_asymmetric import AsymmetricAutoencoderKL, AsymmetricAutoencoderKLConfig
from diffuse_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from diffuse_jax.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from diffuse_jax.models.base import Model, Params
from diffuse_jax.models.clip_vision import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    CLIPVisionOutput,
    StableDiffusionSafetyChecker,
)
from diffuse_jax.models.consistency_decoder import ConsistencyDecoderVAE, ConsistencyDecoderVAEConfig
from diffuse_jax.models.controlnet import ControlNetConfig, ControlNetModel, ControlNetOutput
from diffuse_jax.models.dpt import DPTConfig, DPTForDepthEstimation
from diffuse_jax.models.if_safety_checker import IFSafetyChecker
from diffuse_jax.models.image_attention import ImagePrompt, image_prompts
from diffuse_jax.models.image_normalizer import StableUnCLIPImageNormalizer, StableUnCLIPImageNormalizerConfig
from diffuse_jax.models.ip_adapter import ImageStates, IPAdapter, IPAdapterConfig
from diffuse_jax.models.paella_vq import PaellaVQConfig, PaellaVQModel
from diffuse_jax.models.preconditioning import consistency_denoiser
from diffuse_jax.models.prior_transformer import PriorTransformer, PriorTransformerConfig
from diffuse_jax.models.t2i_adapter import T2IAdapter, T2IAdapterConfig, combined_features
from diffuse_jax.models.tiling import tiled_decode, tiled_encode
from diffuse_jax.models.unclip_text_proj import UnCLIPTextProjConfig, UnCLIPTextProjModel
from diffuse_jax.models.unet_2d import UNet2DConfig, UNet2DModel
from diffuse_jax.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from diffuse_jax.models.vq_model import VQConfig, VQModel
from diffuse_jax.models.wuerstchen import (
    WuerstchenDiffNeXt,
    WuerstchenDiffNeXtConfig,
    WuerstchenPrior,
    WuerstchenPriorConfig,
)

__all__ = [
    "ADMUNet",
    "ADMUNetConfig",
    "AsymmetricAutoencoderKL",
    "AsymmetricAutoencoderKLConfig",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "AutoencoderTiny",
    "AutoencoderTinyConfig",
    "CLIPVisionConfig",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "CLIPVisionOutput",
    "ConsistencyDecoderVAE",
    "ConsistencyDecoderVAEConfig",
    "ControlNetConfig",
    "ControlNetModel",
    "ControlNetOutput",
    "DPTConfig",
    "DPTForDepthEstimation",
    "IFSafetyChecker",
    "IPAdapter",
    "IPAdapterConfig",
    "ImagePrompt",
    "ImageStates",
    "Model",
    "PaellaVQConfig",
    "PaellaVQModel",
    "Params",
    "PriorTransformer",
    "PriorTransformerConfig",
    "StableDiffusionSafetyChecker",
    "StableUnCLIPImageNormalizer",
    "StableUnCLIPImageNormalizerConfig",
    "T2IAdapter",
    "T2IAdapterConfig",
    "UNet2DConditionConfig",
    "UNet2DConditionModel",
    "UNet2DConfig",
    "UNet2DModel",
    "UnCLIPTextProjConfig",
    "UnCLIPTextProjModel",
    "VQConfig",
    "VQModel",
    "WuerstchenDiffNeXt",
    "WuerstchenDiffNeXtConfig",
    "WuerstchenPrior",
    "WuerstchenPriorConfig",
    "combined_features",
    "consistency_denoiser",
    "image_prompts",
    "tiled_decode",
    "tiled_encode",
]
