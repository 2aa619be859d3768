"""Small networks with random weights in PyTorch and here: the same folder, opened by both libraries.

A twin is ``(module, model, params)``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from diffuse_jax import models
from diffuse_jax.models import (
    AutoencoderKL,
    ConsistencyDecoderVAE,
    ControlNetModel,
    T2IAdapter,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffuse_jax.text import CLIPTextModel, CLIPTextModelWithProjection
from tests.oracle.pixel_unets import NCSNPP, PIXEL_UNETS, PIXELS  # noqa: F401  (tests find all twins here)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)  # networks this small are slower on more threads, and far slower on a busy machine

CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"

SMALL = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": (CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "sample_size": 8,
}
SD2 = SMALL | {
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "upcast_attention": True,
    "down_block_types": (CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP),
}
SDXL = SD2 | {
    "upcast_attention": None,
    "down_block_types": (DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, UP),
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
UNETS: dict[str, dict[str, Any]] = {
    "SD 1.x": SMALL | {"layers_per_block": 2},
    "SD 2.x": SD2,
    "SDXL base": SDXL,
    "SDXL pruned": SDXL
    | {
        "mid_block_type": "UNetMidBlock2D",
        "layers_per_block": 2,
        "transformer_layers_per_block": (0, (2, 1, 5)),  # like diffusers', entries beyond the blocks count for nothing
        "reverse_transformer_layers_per_block": ((1, 0, 2), 3),
    },
    "no middle": SDXL
    | {
        "mid_block_type": None,
        "down_block_types": (CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (UP, CROSS_UP),
        "transformer_layers_per_block": (2, 1),
        "reverse_transformer_layers_per_block": (1, (1, 2)),
    },
    "SDXL refiner": SDXL
    | {
        "block_out_channels": (16, 32, 32),
        "down_block_types": (DOWN, CROSS_DOWN, DOWN),
        "up_block_types": (UP, CROSS_UP, UP),
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": 2,
        "projection_class_embeddings_input_dim": 20 + 5 * 8,
    },
    "inpainting, 9 channels": SMALL | {"in_channels": 9},
    "InstructPix2Pix, 8 channels": SMALL | {"in_channels": 8},
    "depth, 5 channels": SD2 | {"in_channels": 5},
    "x4 upscaler": SD2
    | {
        "in_channels": 7,
        "attention_head_dim": 4,
        "down_block_types": (DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, UP),
        "only_cross_attention": (True, False),
        "num_class_embeds": 10,
    },
    "x4 upscaler, cross-attention only": SMALL
    | {"in_channels": 7, "only_cross_attention": True, "num_class_embeds": 10},
    "x2 upscaler": {
        "act_fn": "gelu",
        "attention_head_dim": 8,
        "norm_num_groups": None,
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": (2, 3, 1, 2),
        "time_cond_proj_dim": 12,
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
        "cross_attention_dim": 24,
        "down_block_types": ("KDownBlock2D",) + ("KCrossAttnDownBlock2D",) * 3,
        "up_block_types": ("KCrossAttnUpBlock2D",) * 3 + ("KUpBlock2D",),
        "mid_block_type": None,
        "in_channels": 8,
        "out_channels": 5,
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_type": "fourier",
        "timestep_post_act": "gelu",
        "sample_size": (16, 24),
    },
    "K blocks, otherwise": {
        "act_fn": "silu",
        "attention_head_dim": (16, 8, 32),
        "norm_num_groups": 8,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": (1, 1, 2),
        "time_embedding_dim": 64,
        "cross_attention_dim": 24,
        "down_block_types": ("KCrossAttnDownBlock2D", "KDownBlock2D", "KCrossAttnDownBlock2D"),
        "up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D", "KCrossAttnUpBlock2D"),
        "mid_block_type": None,
        "norm_eps": 1e-3,
        "flip_sin_to_cos": False,
        "time_embedding_type": "fourier",
        "sample_size": 8,
    },
    "Fourier": SMALL | {"time_embedding_type": "fourier", "timestep_post_act": "silu"},
    "LCM": SMALL | {"time_cond_proj_dim": 8},
    "UnCLIP": SD2 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
    "odd sizes, 9 x 13": SMALL
    | {
        "block_out_channels": (16, 16, 32),
        "down_block_types": (CROSS_DOWN, DOWN, DOWN),
        "up_block_types": (UP, UP, CROSS_UP),
        "sample_size": (9, 13),
    },
    "scale and shift": SMALL | {"resnet_time_scale_shift": "scale_shift", "layers_per_block": (1, 2)},
    "SDXL with GELU": SDXL | {"act_fn": "gelu"},  # which the added conditions do not follow
    "other embeddings": SMALL
    | {
        "class_embed_type": "timestep",
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "act_fn": "gelu",
        "center_input_sample": True,
        "downsample_padding": 0,
        "mid_block_type": None,
        "time_embedding_dim": 40,
        "norm_eps": 1e-3,
    },
    "concatenated classes": SMALL
    | {
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 12,
        "class_embeddings_concat": True,
        "act_fn": "mish",
        "conv_in_kernel": 1,
        "conv_out_kernel": 4,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": (2, 1),
        "reverse_transformer_layers_per_block": (1, 1),
        "down_block_types": (CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP),
    },
}

RESNET_DOWN, JOINT_DOWN = "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"
RESNET_UP, JOINT_UP = "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"
JOINT = SMALL | {
    "down_block_types": (RESNET_DOWN, JOINT_DOWN),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (JOINT_UP, RESNET_UP),
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "scale_shift",
}
IF = JOINT | {
    "in_channels": 3,
    "out_channels": 6,
    "act_fn": "gelu",
    "cross_attention_dim": 32,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 24,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "time_embedding_act_fn": "gelu",
}
KANDINSKY = JOINT | {"out_channels": 8, "encoder_hid_dim": 20}
UNETS |= {
    "IF, first stage": IF,
    "IF, second stage": IF
    | {
        "in_channels": 6,
        "class_embed_type": "timestep",
        "mid_block_scale_factor": 1.414,
        "resnet_out_scale_factor": 1.414,
        "resnet_skip_time_act": True,
        "layers_per_block": (1, 2),
        "encoder_hid_dim_type": None,
    },
    "IF, otherwise": IF
    | {
        "down_block_types": (JOINT_DOWN, DOWN),
        "up_block_types": (UP, JOINT_UP),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "attention_head_dim": (4, 8),
        "mid_block_scale_factor": 2.0,
        "only_cross_attention": (True, False),
        "cross_attention_norm": None,
        "resnet_time_scale_shift": "default",
        "addition_embed_type": "text",
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
    },
    "joint attention to the prompt alone": JOINT
    | {"block_out_channels": (16, 24), "cross_attention_norm": "layer_norm", "only_cross_attention": True},
    "joint attention to the prompt alone in the middle": JOINT | {"mid_block_only_cross_attention": True},
    "Kandinsky 2.1": KANDINSKY | {"encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image"},
    "Kandinsky 2.2": KANDINSKY | {"encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"},
    "Kandinsky 2.2, hint": KANDINSKY
    | {"in_channels": 8, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image_hint"},
}

CONTROLNET = {key: value for key, value in SMALL.items() if key not in ("up_block_types", "sample_size")} | {
    "conditioning_embedding_out_channels": (4, 8, 12)
}
CONTROLNETS: dict[str, dict[str, Any]] = {
    "SD 1.x": CONTROLNET | {"layers_per_block": 2},
    "SD 2.x": CONTROLNET
    | {"attention_head_dim": (2, 4), "use_linear_projection": True, "down_block_types": (CROSS_DOWN, CROSS_DOWN)},
    "SDXL": CONTROLNET
    | {
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "down_block_types": (DOWN, CROSS_DOWN),
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
    },
    "means over positions": CONTROLNET | {"global_pool_conditions": True},
    "classes, bgr": CONTROLNET | {"num_class_embeds": 10, "controlnet_conditioning_channel_order": "bgr"},
    "one channel, no attention in the middle": CONTROLNET
    | {
        "conditioning_channels": 1,
        "conditioning_embedding_out_channels": (8, 16),
        "mid_block_type": "UNetMidBlock2D",
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 12,
        "resnet_time_scale_shift": "scale_shift",
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "block_out_channels": (16, 16, 32),
        "down_block_types": (CROSS_DOWN, DOWN, DOWN),
    },
}

T2I_ADAPTERS: dict[str, dict[str, Any]] = {  # two levels of latents with eight pixels each, as the UNets above take
    "full": {"channels": (16, 32), "num_res_blocks": 1},
    "full, one channel": {"in_channels": 1, "channels": (16, 16, 32), "downscale_factor": 4},
    "XL": {"channels": (16, 32, 32, 32), "downscale_factor": 16, "adapter_type": "full_adapter_xl"},
    "light": {"channels": (16,), "num_res_blocks": 2, "adapter_type": "light_adapter"},
    "light, three stages": {"channels": (8, 16), "downscale_factor": 2, "adapter_type": "light_adapter"},
}

VAE = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
VAES: dict[str, dict[str, Any]] = {
    "SD 1.x and 2.x": VAE | {"layers_per_block": 2},
    "SDXL": VAE | {"scaling_factor": 0.13025, "block_out_channels": (8, 16, 32)},
    "no quant convolutions": VAE | {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
    "no attention": VAE | {"mid_block_add_attention": False, "act_fn": "gelu"},
}

TINY = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (16, 16, 16),
    "num_encoder_blocks": (1, 2, 1),
    "num_decoder_blocks": (2, 1, 1),
}
TINIES: dict[str, dict[str, Any]] = {
    "TAESD": TINY,
    "FLUX.1": TINY | {"latent_channels": 16, "scaling_factor": 0.5, "shift_factor": 0.2},
    "one factor of four": TINY
    | {"upsampling_scaling_factor": 4, "decoder_block_out_channels": (8, 8), "num_decoder_blocks": (0, 1)},
    "other settings": TINY
    | {"act_fn": "silu", "upsample_fn": "bilinear", "latent_magnitude": 2, "latent_shift": 0.4, "in_channels": 3},
}
ASYMMETRIC = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "down_block_out_channels": (8, 16, 16),
    "up_block_out_channels": (8, 16, 32),
    "layers_per_up_block": 2,
    "norm_num_groups": 4,
}
ASYMMETRICS: dict[str, dict[str, Any]] = {
    "widths double": ASYMMETRIC,
    "four levels": ASYMMETRIC
    | {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "down_block_out_channels": (4, 8, 8, 16),
        "up_block_out_channels": (8, 16, 32, 32),
    },
    "one level": ASYMMETRIC
    | {
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "down_block_out_channels": (8,),
        "up_block_out_channels": (16,),
        "scaling_factor": 0.5,
        "act_fn": "gelu",
    },
}
VQ = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "num_vq_embeddings": 20,
    "sample_size": 16,
}
VQS: dict[str, dict[str, Any]] = {
    "latent diffusion": VQ,
    "wider vectors, attention in levels": VQ
    | {
        "vq_embed_dim": 5,
        "act_fn": "gelu",
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    },
    "MoVQ": VQ
    | {
        "block_out_channels": (32, 64),  # its norms have 32 groups
        "latent_channels": 4,
        "norm_type": "spatial",
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    },
    "indices": VQ | {"lookup_from_codebook": True, "mid_block_add_attention": False, "latent_channels": 6},
}

CONSISTENCY_DECODERS: dict[str, dict[str, Any]] = {
    "as published": {
        "encoder_block_out_channels": (8, 16),
        "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
        "encoder_layers_per_block": 1,
        "encoder_norm_num_groups": 4,
        "decoder_block_out_channels": (8, 16, 16),
        "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 3,
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 3,
        "decoder_layers_per_block": 1,
        "decoder_norm_num_groups": 4,
    },
}
CONSISTENCY_DECODERS["otherwise"] = CONSISTENCY_DECODERS["as published"] | {
    "scaling_factor": 0.3,
    "encoder_act_fn": "gelu",
    "decoder_add_attention": True,
    "decoder_block_out_channels": (8, 16),
    "decoder_down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "decoder_up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "decoder_downsample_padding": 0,
    "decoder_norm_eps": 1e-3,
    "decoder_out_channels": 3,
    "decoder_resnet_time_scale_shift": "default",
    "decoder_time_embedding_type": "positional",
}

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "hidden_act": "gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "projection_dim": 24,
}
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIP-L": ("CLIPTextModel", TEXT | {"hidden_act": "quick_gelu"}),
    "OpenCLIP-H": ("CLIPTextModel", TEXT | {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 6}),
    "OpenCLIP bigG": ("CLIPTextModelWithProjection", TEXT),
    "OpenCLIP bigG, corrected ids": ("CLIPTextModelWithProjection", TEXT | {"eos_token_id": 97, "bos_token_id": 96}),
}

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 24,
}
VISIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIP-L": ("CLIPVisionModelWithProjection", VISION),
    "OpenCLIP": ("CLIPVisionModelWithProjection", VISION | {"hidden_act": "gelu", "layer_norm_eps": 1e-3}),
    "no projection": ("CLIPVisionModel", VISION),
    "a rest of the edge, one channel": ("CLIPVisionModel", VISION | {"image_size": 30, "num_channels": 1}),
}

DEPTH = {
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
    "backbone_out_indices": [0, 1, 3, 4],
    "neck_hidden_sizes": [8, 16, 16, 24],
    "fusion_hidden_size": 16,
}
BACKBONE = {
    "model_type": "bit",
    "global_padding": "same",
    "layer_type": "bottleneck",
    "embedding_dynamic_padding": True,
    "depths": [1, 2, 1],
    "hidden_sizes": [16, 32, 64],
    "embedding_size": 8,
    "num_groups": 4,
    "out_features": ["stage1", "stage2", "stage3"],
}
HYBRID = DEPTH | {
    "is_hybrid": True,
    "image_size": 64,
    "patch_size": 16,
    "neck_hidden_sizes": [16, 32, 24, 24],
    "reassemble_factors": [1, 1, 1, 0.5],
    "backbone_featmap_shape": [1, 64, 4, 4],
    "backbone_config": BACKBONE,
}
DEPTHS: dict[str, dict[str, Any]] = {
    "large": DEPTH,
    "hybrid": HYBRID,
    "a wide hybrid": HYBRID
    | {
        "neck_hidden_sizes": [32, 64, 24, 24],
        "backbone_featmap_shape": [1, 128, 4, 4],
        "backbone_config": BACKBONE | {"width_factor": 2, "hidden_act": "gelu", "num_groups": 2},
    },
    "add": DEPTH | {"readout_type": "add", "qkv_bias": False, "hidden_act": "relu", "layer_norm_eps": 1e-3},
    "ignore": DEPTH | {"readout_type": "ignore", "use_bias_in_fusion_residual": False, "head_in_index": 2},
    "a projection": DEPTH | {"add_projection": True, "fusion_hidden_size": 256, "num_hidden_layers": 5},
}

Twin = tuple[Any, Any, Any]


def randomise(module: Any, seed: int = 0) -> Any:
    """Weights that keep activations near unit size and leave no scale one, no bias zero and no attention uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            noise /= math.sqrt(parameter[0].numel())
        else:
            noise = 0.2 * noise + (1.0 if name.endswith("weight") else 0.0)
        parameter.data.copy_(noise)
    return module.eval()


def twin(module: Any, ours: type, folder: Path, seed: int = 0) -> Twin:
    """Save the PyTorch module and open the folder here."""
    randomise(module, seed).save_pretrained(folder)
    return (module, *ours.from_pretrained(folder))


def unet_twin(name: str, folder: Path) -> Twin:
    return twin(diffusers.UNet2DConditionModel(**UNETS[name]), UNet2DConditionModel, folder)


def controlnet_twin(name: str, folder: Path) -> Twin:
    return twin(diffusers.ControlNetModel(**CONTROLNETS[name]), ControlNetModel, folder)


def t2i_adapter_twin(name: str, folder: Path) -> Twin:
    return twin(diffusers.T2IAdapter(**T2I_ADAPTERS[name]), T2IAdapter, folder)


def pixel_unet_twin(name: str, folder: Path) -> Twin:
    return twin(diffusers.UNet2DModel(**PIXEL_UNETS[name]), UNet2DModel, folder)


def vae_twin(name: str, folder: Path) -> Twin:
    return twin(diffusers.AutoencoderKL(**VAES[name]), AutoencoderKL, folder)


def tiny_twin(name: str, folder: Path) -> Twin:
    return twin(diffusers.AutoencoderTiny(**TINIES[name]), models.AutoencoderTiny, folder)


def asymmetric_twin(name: str, folder: Path) -> Twin:
    return twin(diffusers.AsymmetricAutoencoderKL(**ASYMMETRICS[name]), models.AsymmetricAutoencoderKL, folder)


def vq_twin(name: str, folder: Path) -> Twin:
    return twin(diffusers.VQModel(**VQS[name]), models.VQModel, folder)


def consistency_decoder_twin(name: str, folder: Path) -> Twin:
    return twin(diffusers.ConsistencyDecoderVAE(**CONSISTENCY_DECODERS[name]), ConsistencyDecoderVAE, folder)


def text_twin(name: str, folder: Path) -> Twin:
    kind, config = TEXTS[name]
    ours = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}[kind]
    return twin(getattr(transformers, kind)(transformers.CLIPTextConfig(**config)), ours, folder)


def vision_twin(name: str, folder: Path) -> Twin:
    kind, config = VISIONS[name]
    return twin(getattr(transformers, kind)(transformers.CLIPVisionConfig(**config)), getattr(models, kind), folder)


def safety_checker_twin(folder: Path) -> Twin:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    config = transformers.CLIPConfig(vision_config=VISION, projection_dim=24)
    return twin(StableDiffusionSafetyChecker(config), models.StableDiffusionSafetyChecker, folder)


def depth_twin(name: str, folder: Path) -> Twin:
    config = transformers.DPTConfig(**DEPTHS[name])
    return twin(transformers.DPTForDepthEstimation(config), models.DPTForDepthEstimation, folder)
