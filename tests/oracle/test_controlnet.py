"""ControlNets against PyTorch diffusers, and the UNet that adds what they return."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffuse_jax.layouts.original import controlnet_table
from diffuse_jax.layouts.rows import to_original
from diffuse_jax.models import ControlNetModel
from diffuse_jax.weights import names
from diffuse_jax.weights.names import flatten, torch_keys
from tests.oracle import twins
from tests.oracle.comparisons import (
    TOLERANCE,
    channel_first,
    channel_last,
    compare_controlnet,
    controlnet_inputs,
    difference,
    run_controlnet,
    run_torch_controlnet,
    run_unet,
    to_torch,
    unet_inputs,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SIZES = dict.fromkeys(twins.CONTROLNETS, (8, 8)) | {"SD 1.x": (9, 13), "SDXL": (4, 10), "classes, bgr": (5, 3)}


@pytest.mark.parametrize("name", twins.CONTROLNETS)
def test_residuals_equal_pytorch(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    twin = twins.controlnet_twin(name, tmp_path)
    inputs = controlnet_inputs(twin[1], rng, SIZES[name])
    assert max(compare_controlnet(twin, inputs).values()) <= TOLERANCE
    assert_every_input_matters(twin[0], inputs)


def assert_every_input_matters(module: Any, inputs: dict[str, Any]) -> None:
    """Agreement says little about an input that the random weights hardly look at."""
    outputs = run_torch_controlnet(module, inputs)
    leaves, tree = jax.tree.flatten(inputs)
    for i, leaf in enumerate(leaves):
        changed = [*leaves[:i], leaf[::-1].copy(), *leaves[i + 1 :]]
        others = run_torch_controlnet(module, jax.tree.unflatten(tree, changed))
        assert max(map(difference, others, outputs)) > 100 * TOLERANCE, f"input {i} of {tree} has no weight"


@pytest.mark.parametrize("name", ["SD 1.x", "classes, bgr"])
def test_pytorch_opens_what_is_saved_here(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    module, model, params = twins.controlnet_twin(name, tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", params)
    again = diffusers.ControlNetModel.from_pretrained(tmp_path / "ours")
    assert settings(again.config) == settings(module.config)
    inputs = controlnet_inputs(model, rng)
    for ours, theirs in zip(run_torch_controlnet(again, inputs), run_torch_controlnet(module, inputs), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("prefix", ["", "control_model."], ids=["alone", "with its UNet"])
@pytest.mark.parametrize("name", ["SD 1.x", "SD 2.x"])
def test_one_file_in_the_original_layout_is_read_as_by_pytorch(
    name: str, prefix: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    config = twins.CONTROLNETS[name] | {"conditioning_embedding_out_channels": (4, 8, 12, 16)}
    _, model, params = twins.twin(diffusers.ControlNetModel(**config), ControlNetModel, tmp_path / "folder")
    tensors = load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    found = {old: tensors[parts[0][0]] for old, parts in to_original(tensors, controlnet_table(tensors)).items()}
    other = {"model.diffusion_model.out.0.weight": np.zeros(2, np.float32)} if prefix else {}
    save_file({prefix + key: array for key, array in found.items()} | other, tmp_path / "a.safetensors")
    read, own = ControlNetModel.from_single_file(tmp_path / "a.safetensors", config=tmp_path / "folder")
    assert read.config == model.config
    jax.tree.map(np.testing.assert_array_equal, own, params)
    theirs = diffusers.ControlNetModel.from_single_file(
        str(tmp_path / "a.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
    )
    inputs = controlnet_inputs(model, rng)
    for ours, wanted in zip(run_controlnet(read, own, inputs), run_torch_controlnet(theirs, inputs), strict=True):
        assert difference(ours, wanted) <= TOLERANCE


@pytest.mark.parametrize("name", ["SD 1.x", "SDXL"])
def test_one_file_in_the_layout_of_diffusers_is_read_too(name: str, tmp_path: Path) -> None:
    _, model, params = twins.controlnet_twin(name, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    read, own = ControlNetModel.from_single_file(file, config=tmp_path)
    assert read.config == model.config
    jax.tree.map(np.testing.assert_array_equal, own, params)


@pytest.mark.parametrize(
    ("unet", "control"), [("SD 1.x", "SD 1.x"), ("SDXL base", "SDXL"), ("LCM", "means over positions")]
)
def test_a_controlled_unet_equals_pytorch(unet: str, control: str, tmp_path: Path, rng: np.random.Generator) -> None:
    module, model, params = twins.unet_twin(unet, tmp_path / "unet")
    steering, ours, weights = twins.controlnet_twin(control, tmp_path / "control")
    inputs = unet_inputs(model, rng)
    images = controlnet_inputs(ours, rng)["controlnet_cond"]
    *down, middle = run_controlnet(ours, weights, inputs | {"controlnet_cond": images})
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    output = run_unet(model, params, inputs | residuals)

    given = {name: value for name, value in inputs.items() if name != "timestep_cond"}  # theirs has no place for it
    *down, middle = map(channel_first, run_torch_controlnet(steering, given | {"controlnet_cond": images}))
    given = {name: value for name, value in to_torch(inputs).items() if name not in ("sample", "timesteps")}
    with torch.no_grad():
        expected = module(
            channel_first(inputs["sample"]),
            torch.tensor(inputs["timesteps"]),
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            **given,
        ).sample
    assert difference(output, channel_last(expected)) <= TOLERANCE
    assert difference(output, run_unet(model, params, inputs)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["SD 2.x", "SDXL base", "x4 upscaler"])
def test_a_new_controlnet_of_a_unet_equals_that_of_pytorch(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """The same config, names and copied parameters; both draw the image's embedding, up to its last convolution."""
    module, unet, params = twins.unet_twin(name, tmp_path)
    theirs = diffusers.ControlNetModel.from_unet(module, conditioning_channels=2)
    model, copied = ControlNetModel.from_unet(unet, params, conditioning_channels=2)
    assert settings(model.config.to_json()).items() <= settings(theirs.config).items()
    flat, tensors = flatten(copied), theirs.state_dict()
    keys = torch_keys(flat)
    assert keys.keys() == tensors.keys()
    drawn = {key for key in keys if re.match(r"controlnet_cond_embedding\.(conv_in|blocks)", key)}
    for key in keys.keys() - drawn:
        np.testing.assert_array_equal(names.to_torch(keys[key], np.asarray(flat[keys[key]])), tensors[key].numpy())
    for key in drawn:
        assert names.to_torch(keys[key], flat[keys[key]]).shape == tensors[key].shape
        assert bool(np.any(flat[keys[key]])) == key.endswith("weight")
    residuals = run_controlnet(model, copied, controlnet_inputs(model, rng))
    assert not any(map(np.any, residuals))


def settings(config: Any) -> dict[str, Any]:
    """A config as JSON, without what begins with an underscore."""
    return {key: json.dumps(value) for key, value in config.items() if not key.startswith("_")}
