"""A UNet from one file: its configuration from its tensors, and what other files are refused as."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffuse_jax.layouts.kinds import KINDS
from diffuse_jax.layouts.original import unet_table
from diffuse_jax.layouts.rows import combine, to_original
from diffuse_jax.layouts.unet import identified
from diffuse_jax.models import ControlNetModel, UNet2DConditionModel, presets
from diffuse_jax.models.unet_2d_condition import UNet2DConditionConfig
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.weights import WeightsError
from diffuse_jax.weights.names import flatten, to_torch, torch_key
from tests.models.filling import random_params
from tests.pipelines import tiny

PUBLISHED = {
    name: config
    for name, config in vars(presets).items()
    if isinstance(config, UNet2DConditionConfig) and not config.has_k_blocks
}
FOLDERS_ALONE = [name for name in PUBLISHED if name.startswith(("IF_", "KANDINSKY", "KARLO"))]
"""Those that have no layout of one file."""
UNKNOWN = {"extra", "sample_size", "upcast_attention"}
"""What tensors do not say: ``sample_size`` is a guess."""


def tensors_of(config: UNet2DConditionConfig) -> dict[str, np.ndarray]:
    """The tensors of a full-size checkpoint, all zeros that take no memory. Networks that differ in what their first
    convolution takes are traced once."""
    zeros = lambda shape: np.broadcast_to(np.zeros((), np.float16), shape)
    traced = UNet2DConditionModel(config.replace(in_channels=4, sample_size=64)).shapes()
    shapes = {path: leaf.shape for path, leaf in flatten(traced).items()}
    *edges, _, features = shapes["conv_in", "kernel"]
    shapes["conv_in", "kernel"] = (*edges, config.in_channels, features)
    return {torch_key(path): to_torch(path, zeros(shape)) for path, shape in shapes.items()}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in FOLDERS_ALONE])
def test_configurations_of_published_unets_are_in_their_tensors(name: str) -> None:
    found = UNet2DConditionModel.from_config(identified(tensors_of(PUBLISHED[name]))[1]).config
    same = dataclasses.replace(PUBLISHED[name], transformer_layers_per_block=found.transformer_layers_per_block)
    assert same.down_levels() == PUBLISHED[name].down_levels(), "one number for a level says the same as a list of it"
    assert {field for field in vars(found) if getattr(found, field) != getattr(same, field)} <= UNKNOWN


@pytest.mark.parametrize("name", ["IF_II_M_UNET", "KANDINSKY22_UNET", "KARLO_UNET"])
def test_networks_of_folders_alone_are_named(name: str) -> None:
    with pytest.raises(ValueError, match="UNets of DeepFloyd IF and Kandinsky 2 need; open their folder"):
        identified(tensors_of(PUBLISHED[name]))


@pytest.mark.parametrize("channels", [5, 9])
def test_depth_and_inpainting_unets_of_2_are_for_512_pixels(channels: int) -> None:
    config = identified(tensors_of(presets.SD21_UNET.replace(in_channels=channels)))[1]
    assert (config["sample_size"], config["in_channels"]) == (64, channels)


@pytest.mark.parametrize("layout", ["diffusers", "original", "whole checkpoint"])
def test_both_layouts_are_read(layout: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = UNet2DConditionModel(tiny.UNET)
    params = random_params(model.shapes(), rng)
    tensors = {torch_key(path): np.ascontiguousarray(to_torch(path, leaf)) for path, leaf in flatten(params).items()}
    if layout != "diffusers":
        groups = to_original(tensors, unet_table(tensors))
        tensors = {old: combine([(tensors[new], op) for new, op in parts]) for old, parts in groups.items()}
    if layout == "whole checkpoint":
        tensors = {f"model.diffusion_model.{key}": array for key, array in tensors.items()}
        tensors["first_stage_model.encoder.conv_in.weight"] = np.zeros(2, np.float32)
    save_file(tensors, tmp_path / "unet.safetensors")
    read, own = UNet2DConditionModel.from_single_file(tmp_path / "unet.safetensors", config=tiny.UNET.to_json())
    assert read.config == tiny.UNET
    jax.tree.map(np.testing.assert_array_equal, own, params)


OTHERS = {
    "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": "Stable Diffusion 3.*not supported",
    "double_blocks.0.img_attn.norm.key_norm.scale": "FLUX.*not supported",
    "style_embedding": "style adapter of T2I-Adapter.*not supported",
    "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": "ControlNet-LLLite.*not supported",
    "lora_controlnet": "Control-LoRA.*not supported",
    "down_blocks.0.motion_modules.0.norm.weight": "motion module of AnimateDiff.*not supported",
    "adapter.body.0.resnets.0.block1.weight": "T2I-Adapter",
    "ip_adapter.1.to_k_ip.weight": "IP-Adapter",
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": "LoRA, which load_lora_weights",
    "encoder.conv_in.weight": "an autoencoder",
}


@pytest.mark.parametrize("key", OTHERS)
def test_a_file_of_another_kind_is_named(key: str, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({key: np.zeros((2, 2), np.float32)}, file)
    for opens in (UNet2DConditionModel, ControlNetModel, DiffusionPipeline):
        with pytest.raises(WeightsError, match=f"The file holds .*{OTHERS[key]}"):
            opens.from_single_file(file)


def test_networks_given_for_an_adapter_are_named(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    for key, opener in (("conv_out.weight", "UNet2DConditionModel"), ("input_hint_block.0.weight", "ControlNetModel")):
        save_file({key: np.zeros((2, 2), np.float32)}, file)
        with pytest.raises(WeightsError, match=f"which {opener}.from_single_file opens"):
            tiny.pipeline().load_lora_weights(file)


def test_descriptions_end_a_sentence() -> None:
    assert not [what for _, what in KINDS if what.endswith((".", ","))]
