"""A mesh as text means the same wherever the library takes ``mesh=``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from diffuse_jax import UNet2DConditionModel
from diffuse_jax.mesh_axes import MESH_AXES, parse_axes
from diffuse_jax.pipelines import StableDiffusionPipeline
from diffuse_jax.sharding import abstract_mesh, as_mesh, make_mesh, param_shardings, parse_mesh
from diffuse_jax.training.devices import mesh_from
from diffuse_jax.training.settings import DeviceSettings
from tests.pipelines.tiny import pipeline

SIZES = {
    "data=8": (8, 1, 1, 1),
    "data=4,fsdp=2": (4, 2, 1, 1),
    " sequence = 4 , data=2 ": (2, 1, 1, 4),
    "fsdp=8": (1, 8, 1, 1),
    "fsdp=2": (4, 2, 1, 1),  # data takes what remains, as in make_mesh
    "fsdp=-1": (1, 8, 1, 1),
    "tensor=2,fsdp=-1": (1, 4, 2, 1),
    "data=2,fsdp=-1,tensor=2": (2, 2, 2, 1),
}


def test_what_is_no_size_and_no_device() -> None:
    for size in ("2", 1.5, None):
        with pytest.raises(ValueError, match="tensor must be an integer"):
            make_mesh(tensor=size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one device"):
        make_mesh(devices=[])


@pytest.mark.parametrize("text", SIZES)
def test_sizes_of_the_axes(text: str) -> None:
    mesh = parse_mesh(text)
    assert dict(mesh.shape) == dict(zip(MESH_AXES, SIZES[text]))
    assert mesh == make_mesh(**dict(zip(MESH_AXES, SIZES[text])))
    assert as_mesh(text) == as_mesh(mesh) == mesh_from(DeviceSettings(mesh=text)) == mesh


WRONG = {
    "": "AXIS=SIZE pairs",
    "8": "AXIS=SIZE pairs such as data=4,fsdp=2, got '8'",
    "data=4,": "AXIS=SIZE pairs",
    "data=four": "AXIS=SIZE pairs",
    "data=٤": "AXIS=SIZE pairs",
    "model=2": "no axis 'model'; there are data, fsdp, tensor, sequence",
    "data=2,data=4": "'data=2,data=4' names the axis data twice",
    "fsdp=0": "fsdp must be at least 1, or -1 for all remaining devices, got 0",
    "data=-2": "data must be at least 1",
    "data=-1,fsdp=-1": "only one axis of a mesh may be -1",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_text_is_refused_before_anything_is_read(text: str) -> None:
    reads = (
        parse_axes,
        abstract_mesh,
        lambda text: DeviceSettings(mesh=text),
        lambda text: StableDiffusionPipeline.from_pretrained("no/where", mesh=text),
    )
    for read in reads:
        with pytest.raises(ValueError, match=WRONG[text]):
            read(text)


def test_too_many_devices() -> None:
    with pytest.raises(ValueError, match="takes 16 devices, but there are 8|does not fit 8 devices"):
        parse_mesh("data=16")
    assert abstract_mesh("data=16") == AbstractMesh((16, 1, 1, 1), MESH_AXES), "a table needs no devices"
    assert abstract_mesh("fsdp=-1").size == 8


def test_the_whole_mesh_and_parts_of_it_exclude_each_other() -> None:
    for other in ({"mesh_fsdp": 2}, {"mesh_data": 4}, {"mesh_tensor": 2}):
        with pytest.raises(ValueError, match=f"data=8 describes the whole mesh; leave out --{next(iter(other))}"):
            DeviceSettings(mesh="data=8", **other)


def test_pipelines_and_networks_take_a_text(tmp_path: Path) -> None:
    pipe: Any = pipeline()
    folder, text = pipe.save_pretrained(tmp_path), "data=4,fsdp=2"
    opened = StableDiffusionPipeline.from_pretrained(folder, mesh=text)
    for there in (opened, pipe.replace(mesh=text), StableDiffusionPipeline(pipe.components, pipe.params, mesh=text)):
        assert there.mesh == parse_mesh(text)
    model, params = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", mesh=text)
    wanted = param_shardings(model.shapes(), parse_mesh(text))
    assert all(jax.tree.leaves(jax.tree.map(lambda x, sharding: x.sharding == sharding, params, wanted)))
    np.testing.assert_array_equal(params["conv_in"]["bias"], pipe.params["unet"]["conv_in"]["bias"])
