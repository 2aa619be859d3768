"""``config.json`` of published checkpoints as the repositories have it: old and new forms, nulls, unknown keys."""

from __future__ import annotations

from typing import Any

CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"

OLD: dict[str, Any] = {  # the keys of 2022
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
}
SD20 = OLD | {
    "_diffusers_version": "0.8.0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "use_linear_projection": True,
}
NEW: dict[str, Any] = {  # what was added until 2023, with the values that mean "as before"
    "_diffusers_version": "0.19.0.dev0",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": None,
    "use_linear_projection": False,
}
SDXL = (
    OLD
    | NEW
    | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": [CROSS_UP, CROSS_UP, UP],
        "use_linear_projection": True,
    }
)

UNETS: dict[str, dict[str, Any]] = {
    "SD15_UNET": OLD,
    "SSD_1B_UNET": SDXL
    | {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "VEGA_UNET": SDXL | {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1, 2]},
    "SD15_INPAINT_UNET": OLD | {"_name_or_path": "./stable-diffusion-v1-5-inpainting/unet", "in_channels": 9},
    "SD15_PIX2PIX_UNET": OLD | {"_diffusers_version": "0.12.0.dev0", "upcast_attention": False, "in_channels": 8},
    "SD15_LCM_UNET": OLD | NEW | {"_diffusers_version": "0.22.0.dev0", "sample_size": 96, "time_cond_proj_dim": 256},
    "SD20_UNET": SD20,
    "SD21_UNET": SD20 | {"sample_size": 96, "upcast_attention": True, "_diffusers_version": "0.10.0.dev0"},
    "SD20_INPAINT_UNET": SD20 | {"in_channels": 9},
    "SD20_DEPTH_UNET": SD20 | {"in_channels": 5},
    "SD21_UNCLIP_UNET": SD20
    | {
        "sample_size": 96,
        "upcast_attention": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2048,
    },
    "SD21_UNCLIP_L_UNET": SD20
    | {
        "sample_size": 96,
        "upcast_attention": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 1536,
    },
    "X4_UPSCALER_UNET": SD20
    | {
        "attention_head_dim": 8,
        "block_out_channels": [256, 512, 512, 1024],
        "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, CROSS_DOWN],
        "in_channels": 7,
        "num_class_embeds": 1000,
        "only_cross_attention": [True, True, True, False],
        "sample_size": 128,
        "up_block_types": [CROSS_UP, CROSS_UP, CROSS_UP, UP],
    },
    "X2_UPSCALER_UNET": OLD
    | NEW
    | {
        "_diffusers_version": "0.14.0.dev0",
        "act_fn": "gelu",
        "attention_head_dim": 64,
        "block_out_channels": [384, 384, 768, 768],
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
        "down_block_types": ["KDownBlock2D"] + ["KCrossAttnDownBlock2D"] * 3,
        "in_channels": 8,
        "layers_per_block": 4,
        "mid_block_type": None,
        "norm_num_groups": None,
        "out_channels": 5,
        "resnet_time_scale_shift": "scale_shift",
        "sample_size": 128,
        "time_cond_proj_dim": 896,
        "time_embedding_type": "fourier",
        "timestep_post_act": "gelu",
        "up_block_types": ["KCrossAttnUpBlock2D"] * 3 + ["KUpBlock2D"],
    },
    "SDXL_UNET": SDXL,
    "SDXL_REFINER_UNET": SDXL
    | {
        "attention_head_dim": [6, 12, 24, 24],
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
        "projection_class_embeddings_input_dim": 2560,
        "transformer_layers_per_block": 4,
        "up_block_types": [UP, CROSS_UP, CROSS_UP, UP],
    },
}

ONLY_UNET = ("sample_size", "out_channels", "center_input_sample", "up_block_types")
CONTROLNET: dict[str, Any] = {key: value for key, value in OLD.items() if key not in ONLY_UNET} | {
    "_class_name": "ControlNetModel",
    "_diffusers_version": "0.14.0.dev0",
    "class_embed_type": None,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "controlnet_conditioning_channel_order": "rgb",
    "cross_attention_dim": 768,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
    "upcast_attention": False,
    "use_linear_projection": False,
}
CONTROLNETS: dict[str, dict[str, Any]] = {
    "SD15_CONTROLNET": CONTROLNET,
    "SD15_SHUFFLE_CONTROLNET": CONTROLNET | {"_diffusers_version": "0.16.0.dev0", "global_pool_conditions": True},
    "SD21_CONTROLNET": CONTROLNET
    | {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "SDXL_CONTROLNET": CONTROLNET
    | {
        "_diffusers_version": "0.20.0.dev0",
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "conditioning_channels": 3,
        "cross_attention_dim": 2048,
        "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "global_pool_conditions": False,
        "num_attention_heads": None,
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
        "upcast_attention": None,
        "use_linear_projection": True,
    },
}

VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
VAES: dict[str, dict[str, Any]] = {
    "SD_VAE": VAE,
    "SD21_VAE": VAE | {"sample_size": 768, "_class_name": "FlaxAutoencoderKL", "_name_or_path": "v2-768x768/vae"},
    "SDXL_VAE": VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "X4_UPSCALER_VAE": VAE
    | {
        "block_out_channels": [128, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "sample_size": 256,
        "scaling_factor": 0.08333,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    },
}

TEXT: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
TEXTS: dict[str, dict[str, Any]] = {
    "CLIP_L": TEXT,
    "OPENCLIP_H": TEXT
    | {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
    },
    "OPENCLIP_BIGG": TEXT
    | {
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
}
