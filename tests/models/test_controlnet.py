"""What ControlNets promise beyond their outputs: features computed once, exact zeros at the start, clear errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.models import ControlNetModel, UNet2DConditionModel
from diffuse_jax.models.controlnet import check_fits
from diffuse_jax.weights import WeightsError
from tests.models.filling import random_params
from tests.models.test_precision import CONTROLNET, UNET


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def trace(**changes: Any) -> Any:
    """The shapes of the output, from shapes alone."""
    model = ControlNetModel(CONTROLNET)
    inputs = {"sample": shape(2, 8, 6, 4), "timesteps": shape(2), "encoder_hidden_states": shape(2, 5, 24)} | changes
    return jax.eval_shape(lambda p, i: model.apply({"params": p}, **i), model.shapes(), inputs)


def test_residuals_are_those_that_the_unet_takes() -> None:
    output = trace(controlnet_cond=shape(2, 32, 24, 3))
    down = [residual.shape for residual in output.down_block_res_samples]
    assert down == [(2, 8, 6, 16), (2, 8, 6, 16), (2, 4, 3, 16), (2, 4, 3, 32)]
    assert output.mid_block_res_sample.shape == (2, 4, 3, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"takes controlnet_cond \(images\) or features \(from embed\), got neither"),
        ({"controlnet_cond": shape(2, 32, 24, 3), "features": shape(2, 8, 6, 16)}, "got both"),
        ({"controlnet_cond": shape(2, 3, 32, 24)}, r"control images must be \[B,H,W,3\] \(channel-last\)"),
        (
            {"controlnet_cond": shape(2, 32, 32, 3)},
            r"must be \(2, 32, 24, 3\) or features .*, got features \(2, 8, 8, 16\)",
        ),
        ({"controlnet_cond": shape(1, 32, 24, 3)}, r"must be \(2, 32, 24, 3\)"),
        ({"features": shape(2, 8, 6, 8)}, r"features \(2, 8, 6, 16\) for this sample, got features \(2, 8, 6, 8\)"),
        ({"features": shape(2, 8, 6, 16), "sample": shape(2, 8, 6, 9)}, r"sample must be \[B,h,w,4\]"),
    ],
)
def test_wrong_inputs_are_refused_while_tracing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(**changes)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_features_serve_instead_of_images(order: str, rng: np.random.Generator) -> None:
    model = ControlNetModel(CONTROLNET.replace(controlnet_conditioning_channel_order=order))
    params = random_params(model.shapes(), rng)
    normal = lambda *sizes: jnp.asarray(rng.standard_normal(sizes), jnp.float32)
    inputs = {"sample": normal(2, 4, 4, 4), "timesteps": jnp.array([3, 700]), "encoder_hidden_states": normal(2, 5, 24)}
    images = normal(2, 16, 16, 3)
    run = jax.jit(lambda **given: model.apply({"params": params}, **inputs, **given))
    features = model.apply({"params": params}, images, method="embed")
    ours, theirs = run(features=features), run(controlnet_cond=images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
    other = ControlNetModel(
        CONTROLNET.replace(controlnet_conditioning_channel_order="bgr" if order == "rgb" else "rgb")
    )
    np.testing.assert_array_equal(other.apply({"params": params}, images[..., ::-1], method="embed"), features)
    assert not np.allclose(other.apply({"params": params}, images, method="embed"), features, atol=0.1)


def test_a_new_controlnet_of_a_unet_changes_nothing_and_owns_its_parameters(rng: np.random.Generator) -> None:
    unet = UNet2DConditionModel(UNET, dtype=jnp.bfloat16, remat="blocks")
    params = random_params(unet.shapes(), rng, jnp.float16)
    make = lambda seed: ControlNetModel.from_unet(
        unet, params, conditioning_embedding_out_channels=(4, 8, 12), key=jax.random.key(seed)
    )
    model, new = make(0)
    assert model == ControlNetModel(CONTROLNET, dtype=jnp.bfloat16, remat="blocks")
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(lambda leaf: leaf.shape, model.shapes())
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(jnp.float16)}
    pointer = lambda params: params["conv_in"]["kernel"].unsafe_buffer_pointer()
    assert pointer(new) != pointer(params)
    drawn = lambda params: np.asarray(params["controlnet_cond_embedding"]["blocks_1"]["kernel"])
    assert np.array_equal(drawn(new), drawn(make(0)[1]))
    assert not np.array_equal(drawn(new), drawn(make(1)[1]))
    inputs = {name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in model.example_inputs().items()}
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(model.apply({"params": new}, **inputs)))


@pytest.mark.parametrize("changes", [{"time_cond_proj_dim": 8}, {"conv_in_kernel": 1}, {"center_input_sample": True}])
def test_a_unet_with_another_encoder_is_refused(changes: dict[str, Any]) -> None:
    unet = UNet2DConditionModel(UNET.replace(**changes))
    (name,) = changes
    with pytest.raises(ValueError, match=f"a ControlNet has no {name}, but this UNet has {name}={changes[name]}"):
        ControlNetModel.from_unet(unet, unet.shapes())


def test_parameters_of_another_unet_are_refused(rng: np.random.Generator) -> None:
    other = random_params(UNet2DConditionModel(UNET.replace(layers_per_block=2)).shapes(), rng)
    with pytest.raises(WeightsError, match="UNet2DConditionModel"):
        ControlNetModel.from_unet(UNet2DConditionModel(UNET), other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": (32, 64)}, r"block_out_channels=\(32, 64\), and the UNet \(16, 32\)"),
        ({"layers_per_block": 3}, r"layers_per_block=\(3, 3\), and the UNet \(1, 1\)"),
        ({"cross_attention_dim": 32}, "cross_attention_dim=32, and the UNet 24"),
    ],
)
def test_one_for_another_unet_is_refused(changes: dict[str, Any], message: str) -> None:
    check_fits(CONTROLNET, UNET)
    check_fits(CONTROLNET, UNET.replace(layers_per_block=(1, 1), in_channels=9))
    with pytest.raises(ValueError, match=f"this ControlNet is for another UNet: it has {message}"):
        check_fits(CONTROLNET.replace(**changes), UNET)
