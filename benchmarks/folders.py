"""Pipelines with random weights, saved as folders that every library can open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).resolve().parents[1] / "diffuse_jax" / "assets" / "emoji"


def make_folder(name: str, cache: Path) -> Path:
    """The pipeline's folder, written at first use: random weights, the shipped model's tokenizer, DDIM."""
    if name == "emoji":
        return SHIPPED
    folder = cache / name
    if (folder / "model_index.json").exists():
        return folder
    from unet_step import weights

    from diffuse_jax import DDIMScheduler, StableDiffusionPipeline
    from diffuse_jax.weights.names import unflatten

    parts = networks(name)
    params = {part: unflatten(weights(model)) for part, model in parts.items()}
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    write_tokenizer(folder / "tokenizer")
    import transformers

    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    absent = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    StableDiffusionPipeline(
        {**parts, **absent, "tokenizer": tokenizer, "scheduler": scheduler}, params, {"requires_safety_checker": False}
    ).save_pretrained(folder)
    write_tokenizer(folder / "tokenizer")
    return folder


def networks(name: str) -> dict[str, Any]:
    """The networks of a folder by component; 1.3, 51 or 1,066 million parameters."""
    from diffuse_jax.models import (
        AutoencoderKL,
        AutoencoderKLConfig,
        UNet2DConditionConfig,
        UNet2DConditionModel,
        presets,
    )
    from diffuse_jax.text import CLIPTextConfig, CLIPTextModel
    from diffuse_jax.text import presets as text_presets

    if name == "sd15":
        unet, vae, text = presets.SD15_UNET, presets.SD_VAE, text_presets.CLIP_L
    else:
        small = name == "tiny"
        width, channels = (64, (32, 64)) if small else (256, (128, 256, 384))
        latents, vae_channels = (16, (32, 32, 32)) if small else (32, (64, 128, 128, 256))
        levels = len(channels) - 1
        unet = UNet2DConditionConfig(
            sample_size=latents,
            block_out_channels=channels,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * levels + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * levels,
            cross_attention_dim=width,
            num_attention_heads=2 if small else 8,
        )
        vae = AutoencoderKLConfig(
            sample_size=latents * 2 ** (len(vae_channels) - 1),
            block_out_channels=vae_channels,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
        )
        text = CLIPTextConfig(
            vocab_size=1800,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2 if small else 4,
            num_attention_heads=2 if small else 4,
            bos_token_id=1798,
            eos_token_id=1799,
        )
    return {"unet": UNet2DConditionModel(unet), "vae": AutoencoderKL(vae), "text_encoder": CLIPTextModel(text)}


def write_tokenizer(folder: Path) -> None:
    """The shipped model's tokenizer, for 77 tokens, in the two files that every version of transformers reads."""
    shutil.copytree(SHIPPED / "tokenizer", folder, dirs_exist_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 77}, indent=2))
