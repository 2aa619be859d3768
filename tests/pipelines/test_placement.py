"""Where parameters are placed after every way to give a pipeline a mesh, and that padding is invisible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.pipelines import StableDiffusionPipeline
from diffuse_jax.pipelines.placement import place_rows
from diffuse_jax.sharding import make_mesh, param_shardings
from tests.pipelines.tiny import pipeline

REQUEST = {"num_inference_steps": 2, "seed": 0, "output_type": "np"}
MESH = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return pipeline()


def devices(params: Any) -> set[jax.Device]:
    return set().union(*(leaf.sharding.device_set for leaf in jax.tree.leaves(params)))


def kernel(pipe: StableDiffusionPipeline) -> jax.Array:
    return pipe.params["unet"]["mid_block"]["resnets_0"]["conv1"]["kernel"]


def test_a_mesh_moves_parameters_there_and_back(pipe: StableDiffusionPipeline):
    alone, there = pipe("a", **REQUEST).images, pipe.replace(mesh=MESH)
    assert devices(there.params) == {*MESH.devices.flat}
    assert not kernel(there).sharding.is_fully_replicated, "cut as when it is opened on the mesh"
    np.testing.assert_allclose(there("a", **REQUEST).images, alone, atol=1e-5)
    back = there.replace(mesh=None)
    assert devices(back.params) == {jax.devices()[0]}
    np.testing.assert_array_equal(back("a", **REQUEST).images, alone)


def test_parameters_sharded_by_the_caller_stay_sharded_without_a_mesh(pipe: StableDiffusionPipeline):
    cut = {name: jax.device_put(tree, param_shardings(tree, MESH)) for name, tree in pipe.params.items()}
    there = pipe.replace(params=cut)
    assert kernel(there) is cut["unet"]["mid_block"]["resnets_0"]["conv1"]["kernel"]
    np.testing.assert_allclose(there("a", **REQUEST).images, pipe("a", **REQUEST).images, atol=1e-5)


def test_components_that_are_given_go_to_the_mesh(pipe: StableDiffusionPipeline, tmp_path: Path):
    unet, vae = ((pipe.components[name], pipe.params[name]) for name in ("unet", "vae"))
    opened = StableDiffusionPipeline.from_pretrained(pipe.save_pretrained(tmp_path), mesh=MESH, unet=unet)
    made = StableDiffusionPipeline(pipe.components, pipe.params, mesh=MESH)
    for there in (opened, made, opened.replace(vae=vae), StableDiffusionPipeline.from_pipe(made, unet=unet)):
        assert devices(there.params) == {*MESH.devices.flat}
    assert kernel(opened.replace(vae=vae)) is kernel(opened), "what is there already is not copied"


def test_offloaded_parameters_stay_on_the_host_of_a_mesh(pipe: StableDiffusionPipeline):
    there = pipe.offload("unet").replace(mesh=MESH)
    assert isinstance(kernel(there), np.ndarray)
    np.testing.assert_allclose(there("a", **REQUEST).images, pipe("a", **REQUEST).images, atol=1e-5)


@pytest.mark.slow
def test_a_callback_sees_the_images_of_the_request(pipe: StableDiffusionPipeline):
    """Three images are computed as four; in batches of two, as two and two."""
    seen, request = [], REQUEST | {"seed": [0, 1, 2]}
    note = lambda pipe, i, t, values: seen.append(values["latents"].shape[0])
    watched = pipe(["a"] * 3, **request, callback_on_step_end=note).images
    assert seen == [3, 3]
    pipe(["a"] * 3, **request, batch_size=2, callback_on_step_end=note)
    assert seen[2:] == [2, 2, 1, 1]
    blank = lambda pipe, i, t, values: {"latents": np.zeros_like(values["latents"], np.float64)}
    changed = pipe(["a"] * 3, **request, callback_on_step_end=blank).images
    assert np.abs(changed - watched).mean() > 0.01
    wrong = lambda pipe, i, t, values: {"latents": jnp.zeros((4, 8, 8, 4))}
    with pytest.raises(ValueError, match=r"returned latents of shape \(4, 8, 8, 4\), expected \(3, 8, 8, 4\)"):
        pipe(["a"] * 3, **request, callback_on_step_end=wrong)


def test_rows_on_a_default_device_that_is_named_stay() -> None:
    row = jnp.ones(3)
    with jax.default_device("cpu"):
        assert place_rows(None, {"row": row})["row"].unsafe_buffer_pointer() == row.unsafe_buffer_pointer()
