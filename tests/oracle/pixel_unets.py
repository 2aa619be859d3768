"""Small UNets over pixels, one for each kind of published configuration."""

from __future__ import annotations

from typing import Any

PIXELS = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "sample_size": 8,
}
NCSNPP = {
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "time_embedding_type": "fourier",
    "attention_head_dim": None,
    "norm_num_groups": None,
    "norm_eps": 1e-6,
    "mid_block_scale_factor": 2**0.5,
    "sample_size": 8,
}
PIXEL_UNETS: dict[str, dict[str, Any]] = {
    "DDPM": PIXELS
    | {"layers_per_block": 2, "block_out_channels": (16, 16, 32)}
    | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")}
    | {"up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")},
    "DDPM, first release": PIXELS
    | {
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
    "classes": PIXELS | {"num_class_embeds": 10, "in_channels": 4, "out_channels": 8},
    "consistency model": PIXELS
    | {
        "num_class_embeds": 10,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
    },
    "norm without groups": PIXELS | {"resnet_time_scale_shift": "scale_shift"},
    "super-resolution of unCLIP": PIXELS
    | {
        "in_channels": 6,
        "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "add_attention": False,
    },
    "other embeddings": PIXELS
    | {"class_embed_type": "timestep", "center_input_sample": True, "time_embedding_dim": 40, "act_fn": "gelu"},
    "learned embeddings": PIXELS | {"time_embedding_type": "learned", "num_train_timesteps": 800},
    "no middle": PIXELS | {"mid_block_type": None},
    "NCSN++": NCSNPP,
    "NCSN++ at the finest level": NCSNPP
    | {
        "down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "SkipUpBlock2D"),
        "norm_num_groups": 4,
        "time_embedding_type": "positional",
        "center_input_sample": True,
        "class_embed_type": "timestep",
    },
}
