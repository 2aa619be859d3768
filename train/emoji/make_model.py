"""Write an untrained miniature Stable Diffusion for 64x64 images: every folder of a pipeline except the tokenizer.

The parameters come from ``--seed``. What is decided here is decided for the shipped model: 16x16 latents with four
channels, attention at 8x8 and 4x4, velocity prediction on a schedule that ends in pure noise. Example:

    python train/emoji/make_model.py --output_dir runs/emoji/start
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffuse_jax.bounds import COUNT, SEED, number
from diffuse_jax.writing import path_text

if TYPE_CHECKING:
    from diffuse_jax.models.base import Model
    from diffuse_jax.text.clip import CLIPTextConfig

VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 48),
    "norm_num_groups": 8,
    "sample_size": 64,
    "force_upcast": False,
}
UNET: dict[str, Any] = {
    "sample_size": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (48, 96, 144),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 128,
    "num_attention_heads": (2, 4, 6),
    "use_linear_projection": True,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def text_config(vocab_size: int, length: int) -> CLIPTextConfig:
    """Two layers of width 128; start and end of text are the last two symbols, as in CLIP."""
    from diffuse_jax.text.clip import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )


def networks(vocab_size: int, length: int) -> dict[str, Model]:
    """The networks, without parameters."""
    from diffuse_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
    from diffuse_jax.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
    from diffuse_jax.text.clip import CLIPTextModel

    return {
        "vae": AutoencoderKL(AutoencoderKLConfig(**VAE)),
        "unet": UNet2DConditionModel(UNet2DConditionConfig(**UNET)),
        "text_encoder": CLIPTextModel(text_config(vocab_size, length)),
    }


def main() -> None:
    args = parse_args()
    import jax

    from diffuse_jax.training.initial import initial_params

    folder = Path(args.output_dir)
    for place, (name, model) in enumerate(networks(args.vocab_size, args.model_max_length).items()):
        zero = {} if name == "unet" else {"zero": ("/conv2/kernel$",)}
        params = initial_params(model.shapes(), args.seed + place, **zero)
        model.save_pretrained(folder / name, params)
        print(f"{name}: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")
    (folder / "scheduler").mkdir(exist_ok=True)
    for path, data in (("scheduler/scheduler_config.json", SCHEDULER), ("model_index.json", MODEL_INDEX)):
        (folder / path).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=path_text,
        required=True,
        help="folder to write; make_tokenizer.py writes tokenizer/ into it",
    )
    parser.add_argument("--seed", type=number(SEED), default=0, help="random seed (default 0)")
    parser.add_argument(
        "--vocab_size", type=number(COUNT), default=1800, help="vocabulary size of the tokenizer (default 1800)"
    )
    parser.add_argument(
        "--model_max_length", type=number(COUNT), default=24, help="maximum length of the tokenizer (default 24)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
