"""A tiny Stable Diffusion in memory, with a tokenizer of single characters and random weights."""

from __future__ import annotations

import numpy as np
import transformers

from diffuse_jax.models import AutoencoderKL, AutoencoderKLConfig, UNet2DConditionConfig, UNet2DConditionModel
from diffuse_jax.pipelines import StableDiffusionPipeline
from diffuse_jax.pipelines.programs import Programs
from diffuse_jax.schedulers import DDIMScheduler
from diffuse_jax.text import CLIPTextConfig, CLIPTextModel
from tests.models.filling import random_params

UNET = UNet2DConditionConfig(
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=16,
    norm_num_groups=4,
    num_attention_heads=2,
)
VAE = AutoencoderKLConfig(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
    sample_size=16,
)


def tokenizer() -> transformers.CLIPTokenizer:
    letters = [chr(c) for c in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(letters + [c + "</w>" for c in letters] + words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


def pipeline(**settings: object) -> StableDiffusionPipeline:
    """A pipeline with its own seed and its own compiled programs."""
    rng = np.random.default_rng(0)
    tok = tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
    )
    networks = {
        "unet": UNet2DConditionModel(UNET),
        "vae": AutoencoderKL(VAE),
        "text_encoder": CLIPTextModel(text),
    }
    params = {name: random_params(network.shapes(), rng) for name, network in networks.items()}
    parts = {**networks, "tokenizer": tok, "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1)}
    return StableDiffusionPipeline(parts, params, programs=Programs(), **settings)
