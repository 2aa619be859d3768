"""ControlNets in one file: where their names are found, what their tensors show, and files that hold none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffuse_jax.layouts import read_network
from diffuse_jax.layouts.configs import controlnet_config
from diffuse_jax.layouts.original import controlnet_table
from diffuse_jax.layouts.rows import to_original
from diffuse_jax.models import ControlNetModel
from diffuse_jax.models.controlnet import ControlNetConfig
from diffuse_jax.weights import WeightsError
from diffuse_jax.weights.names import flatten, torch_keys

CROSS, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
PUBLISHED = {
    "lllyasviel/control_v11p_sd15_canny": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "thibaud/controlnet-sd21-canny-diffusers": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "diffusers/controlnet-canny-sdxl-1.0": {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": [DOWN, CROSS, CROSS],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def tensors_of(config: ControlNetConfig) -> dict[str, np.ndarray]:
    """Every tensor under diffusers' name, of the right shape, without allocating memory."""
    keys, zero = torch_keys(flat := flatten(ControlNetModel(config).shapes())), np.float32(0)
    shape = lambda leaf: leaf.shape if len(leaf.shape) < 4 else tuple(leaf.shape[k] for k in (3, 2, 0, 1))
    turned = lambda key, leaf: leaf.shape[::-1] if len(leaf.shape) == 2 and key.endswith("weight") else shape(leaf)
    return {key: np.broadcast_to(zero, turned(key, flat[path])) for key, path in keys.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_of_published_networks_are_read_off_their_tensors(name: str):
    wanted = ControlNetConfig.from_json(PUBLISHED[name])
    read = ControlNetConfig.from_json(controlnet_config(tensors_of(wanted)))
    for field in ("num_attention_heads", "transformer_layers_per_block", "only_cross_attention", "down_block_types"):
        assert read.per_level(field) == wanted.per_level(field), field
    assert flatten(ControlNetModel(read).shapes()) == flatten(ControlNetModel(wanted).shapes())


def test_names_are_those_of_the_original():
    """Of cldm/cldm.py, written from the published files."""
    found = to_original(keys := tensors_of(ControlNetConfig()), controlnet_table(keys))
    published = {
        "input_hint_block.0.weight": "controlnet_cond_embedding.conv_in.weight",
        "input_hint_block.2.bias": "controlnet_cond_embedding.blocks.0.bias",
        "input_hint_block.12.weight": "controlnet_cond_embedding.blocks.5.weight",
        "input_hint_block.14.weight": "controlnet_cond_embedding.conv_out.weight",
        "zero_convs.0.0.weight": "controlnet_down_blocks.0.weight",
        "zero_convs.11.0.bias": "controlnet_down_blocks.11.bias",
        "middle_block_out.0.weight": "controlnet_mid_block.weight",
        "input_blocks.4.0.skip_connection.weight": "down_blocks.1.resnets.0.conv_shortcut.weight",
    }
    assert {old: found[old][0][0] for old in published} == published
    assert len(found) == len(keys)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.diffusion_model.out.0.weight"], "contains no ControlNet: there is no 'input_hint_block.0.weight'"),
        (["input_hint_block.0.weight"], "cannot infer the configuration of its ControlNet"),
        (
            ["controlnet_cond_embedding.conv_in.weight"],
            "cannot infer the configuration of its ControlNet",
        ),
    ],
)
def test_files_without_a_whole_controlnet_are_refused(names: list[str], message: str, tmp_path: Path):
    save_file({name: np.zeros((1, 1), np.float32) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=message):
        read_network(tmp_path / "a.safetensors", "ControlNetModel")


def test_a_folder_is_not_a_file(tmp_path: Path):
    with pytest.raises(WeightsError, match="is a folder.*from_pretrained opens folders"):
        ControlNetModel.from_single_file(tmp_path)
    with pytest.raises(TypeError, match="there is no torch_dtype= here: pass dtype="):
        ControlNetModel.from_single_file(tmp_path, torch_dtype="float16")
