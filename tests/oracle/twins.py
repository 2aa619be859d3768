"""Small networks with random weights in PyTorch and here: the same folder, opened by both libraries.

A twin is ``(module, model, params)``. Inputs are channel-last NumPy arrays; the PyTorch side turns them at its border.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax.models import AutoencoderKL, UNet2DConditionModel
from diffuse_jax.text import CLIPTextModel, CLIPTextModelWithProjection

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)  # networks this small are slower on more threads, and far slower on a busy machine

TOLERANCE = 1e-4
"""Largest absolute difference that is accepted, of outputs scaled to unit variance."""

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
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": (2, 1),
        "reverse_transformer_layers_per_block": (1, 1),
        "down_block_types": (CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP),
    },
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


def twin(module: Any, ours: type, folder: Path) -> Twin:
    """Save the PyTorch module and open the folder here."""
    randomise(module).save_pretrained(folder)
    return (module, *ours.from_pretrained(folder))


def unet_twin(name: str, folder: Path) -> Twin:
    return twin(diffusers.UNet2DConditionModel(**UNETS[name]), UNet2DConditionModel, folder)


def vae_twin(name: str, folder: Path) -> Twin:
    return twin(diffusers.AutoencoderKL(**VAES[name]), AutoencoderKL, folder)


def text_twin(name: str, folder: Path) -> Twin:
    kind, config = TEXTS[name]
    ours = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}[kind]
    return twin(getattr(transformers, kind)(transformers.CLIPTextConfig(**config)), ours, folder)


def unet_inputs(model: UNet2DConditionModel, rng: np.random.Generator) -> dict[str, Any]:
    """Inputs for a batch of two, of the size that the config names; one for every condition it has."""
    c = model.config
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    height, width = c.sample_size if isinstance(c.sample_size, tuple) else (c.sample_size, c.sample_size)
    inputs: dict[str, Any] = {
        "sample": normal(2, height, width, c.in_channels),
        "timesteps": np.array([3, 701], np.int32),
        "encoder_hidden_states": normal(2, 5, c.cross_attention_dim),
    }
    if c.addition_embed_type == "text_time":
        count = (c.projection_class_embeddings_input_dim - 20) // c.addition_time_embed_dim
        ids = rng.integers(0, 1025, (2, count)).astype(np.float32)
        inputs["added_cond_kwargs"] = {"text_embeds": normal(2, 20), "time_ids": ids}
    if c.class_embed_type in ("projection", "simple_projection"):
        inputs["class_labels"] = normal(2, c.projection_class_embeddings_input_dim)
    elif c.num_class_embeds or c.class_embed_type == "timestep":
        inputs["class_labels"] = np.array([1, 9], np.int32)
    if c.time_cond_proj_dim:
        inputs["timestep_cond"] = normal(2, c.time_cond_proj_dim)
    return inputs


def run_unet(model: UNet2DConditionModel, params: Any, inputs: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, i: model.apply({"params": p}, **i))(params, dict(inputs)))


def run_torch_unet(module: Any, inputs: Mapping[str, Any]) -> np.ndarray:
    given = {k: v for k, v in to_torch(inputs).items() if k not in ("sample", "timesteps")}
    with torch.no_grad():
        return channel_last(module(channel_first(inputs["sample"]), torch.tensor(inputs["timesteps"]), **given).sample)


def to_torch(tree: Any) -> Any:
    return jax.tree.map(torch.tensor, dict(tree))


def channel_first(x: np.ndarray) -> Any:
    return torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def channel_last(x: Any) -> np.ndarray:
    return x.numpy().transpose(0, 2, 3, 1)


def difference(ours: Any, theirs: Any) -> float:
    """Largest absolute difference after scaling the reference to unit variance."""
    theirs = np.asarray(theirs, np.float64)
    ours = np.asarray(ours, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / theirs.std())
