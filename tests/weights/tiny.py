"""Small networks of every family that the library opens, and helpers to write and compare their files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.models import AutoencoderKL, AutoencoderKLConfig, Model, UNet2DConditionConfig, UNet2DConditionModel
from diffuse_jax.text import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from diffuse_jax.weights import names

SD1 = UNet2DConditionConfig(
    sample_size=64,
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=64,
)
SD2 = SD1.replace(use_linear_projection=True, num_attention_heads=(1, 1), sample_size=96)
XL = SD2.replace(
    sample_size=128,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=2,
    cross_attention_dim=128,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=1600,
)
X4 = SD2.replace(
    sample_size=128,
    in_channels=7,
    num_attention_heads=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    num_class_embeds=10,
)
VAE = AutoencoderKLConfig(
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    sample_size=512,
)
CLIP = CLIPTextConfig(
    vocab_size=60,
    hidden_size=64,
    intermediate_size=80,
    projection_dim=64,
    num_hidden_layers=2,
    num_attention_heads=1,
    max_position_embeddings=16,
    bos_token_id=0,
    eos_token_id=2,
)
OPENCLIP = CLIP.replace(hidden_act="gelu", projection_dim=512)

NETWORKS: dict[str, Model] = {
    "sd1": UNet2DConditionModel(SD1),
    "sd1-inpaint": UNet2DConditionModel(SD1.replace(in_channels=9)),
    "sd1-lcm": UNet2DConditionModel(SD1.replace(time_cond_proj_dim=16)),
    "sd2": UNet2DConditionModel(SD2),
    "sd2-unclip": UNet2DConditionModel(
        SD2.replace(class_embed_type="projection", projection_class_embeddings_input_dim=24)
    ),
    "xl": UNet2DConditionModel(XL),
    "x4": UNet2DConditionModel(X4),
    "vae": AutoencoderKL(VAE),
    "clip": CLIPTextModel(CLIP),
    "clip-projection": CLIPTextModelWithProjection(CLIP.replace(projection_dim=24)),
}


def views(model: Model, rng: np.random.Generator, dtype: Any = np.float32) -> dict[names.Path, np.ndarray]:
    """Random arrays in the shapes of a network, by path."""
    shapes = names.flatten(model.shapes())
    return {path: rng.standard_normal(leaf.shape).astype(dtype) for path, leaf in shapes.items()}


def torch_tensors(model: Model, rng: np.random.Generator, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random arrays as a PyTorch checkpoint of a network has them."""
    arrays = views(model, rng, dtype)
    return {
        key: np.ascontiguousarray(names.to_torch(path, arrays[path])) for key, path in names.torch_keys(arrays).items()
    }


def write_raw(path: Path, header: Any, data: bytes) -> Path:
    """A file with any safetensors header (an object, or raw bytes) in front of any data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays agree in dtype, shape and bits."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
