"""IP-Adapters: what they refuse, from shapes alone, and that images, scales and masks are data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffuse_jax.layouts import read_ip_adapter
from diffuse_jax.models import ImagePrompt, ImageStates, IPAdapter, IPAdapterConfig, UNet2DConditionModel, image_prompts
from diffuse_jax.models.image_attention import check_fits, cross_attentions
from diffuse_jax.models.remat import POLICIES
from diffuse_jax.weights import WeightsError
from tests.models.filling import random_params
from tests.models.test_precision import UNET

LAYERS = (*cross_attentions(UNET).values(),)
PLAIN = IPAdapterConfig(image_width=10, cross_attention_dim=24, layer_widths=LAYERS, tokens=2)
FACES = PLAIN.replace(projection="face_resampler", heads=1, hidden_width=16, face_width=8)


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        (PLAIN, {"images": shape(2, 10)}, r"images of this IP-Adapter must be \[B,N,10\], got \(2, 10\)"),
        (PLAIN, {"images": shape(2, 1, 12)}, r"must be \[B,N,10\]"),
        (PLAIN.replace(projection="resampler"), {"images": shape(2, 1, 10)}, r"\[B,N,T,10\] \(hidden states\)"),
        (PLAIN, {"images": shape(2, 1, 10), "states": shape(2, 1, 3, 10)}, "takes no states beside images"),
        (FACES, {"images": shape(2, 1, 8)}, "takes states beside images"),
        (
            FACES,
            {"images": shape(2, 1, 8), "states": shape(2, 3, 10)},
            r"states must be \[2,1,T,10\], got \(2, 3, 10\)",
        ),
    ],
)
def test_wrong_images_are_refused(config: IPAdapterConfig, inputs: dict[str, Any], message: str) -> None:
    model = IPAdapter(config)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p, i: model.apply({"params": p}, **i), model.shapes(), inputs)


def states(batch: int = 2, images: int = 1, layers: int = len(LAYERS)) -> ImageStates:
    arrays = tuple(jnp.ones((batch, images, 2, width)) for width in LAYERS[:layers])
    return ImageStates(arrays, arrays)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (ImagePrompt(states(layers=2)), "for 2 cross-attentions cannot be added to a UNet with 4"),
        (ImagePrompt(states(), jnp.ones(3)), r"must be one number, \(2,\) or \(2, 4\), got \(3,\)"),
        (ImagePrompt(states(images=3), jnp.ones(2), jnp.ones((1, 3, 8, 8))), r"\(2, 3\) or \(2, 3, 4\), got \(2,\)"),
        (ImagePrompt(states(images=3), 1.0, jnp.ones((1, 2, 8, 8))), r"must be \[2 or 1,3,H,W\], got \(1, 2, 8, 8\)"),
        (ImagePrompt(states(batch=1)), "do not fit a query of 2 images"),
    ],
)
def test_what_does_not_fit_a_unet_is_refused(prompt: ImagePrompt, message: str) -> None:
    model = UNet2DConditionModel(UNET)
    inputs = {"sample": shape(2, 8, 8, 4), "timesteps": shape(2), "encoder_hidden_states": shape(2, 5, 24)}

    def forward(params: Any, inputs: Any) -> Any:
        with image_prompts(UNET, [prompt]):
            return model.apply({"params": params}, **inputs)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(forward, model.shapes(), inputs)


def test_an_adapter_for_another_unet_is_refused() -> None:
    check_fits(PLAIN, UNET)
    with pytest.raises(
        ValueError,
        match="for a UNet with 16 cross-attentions of widths 320, 640, 1280 to states of 768; this one has 4",
    ):
        check_fits(IPAdapterConfig(), UNET)


@pytest.mark.parametrize("remat", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in POLICIES[1:])])
def test_new_images_and_scales_compile_nothing(remat: str, rng: np.random.Generator) -> None:
    """The UNet alone is unchanged, and an adapter of strength zero changes nothing; gradients reach the images."""
    unet, net = UNet2DConditionModel(UNET, remat=remat), IPAdapter(PLAIN)
    params, own = random_params(unet.shapes(), rng), random_params(net.shapes(), rng)
    normal = lambda *sizes: jnp.asarray(rng.standard_normal(sizes), jnp.float32)
    inputs = (normal(2, 8, 8, 4), jnp.array([10, 900]), normal(2, 5, 24))

    @jax.jit
    def run(images: jax.Array, scale: jax.Array) -> jax.Array:
        with image_prompts(UNET, [ImagePrompt(net.apply({"params": own}, images), scale)]):
            return unet.apply({"params": params}, *inputs)

    images = normal(2, 1, 10)
    first, second = run(images, jnp.zeros(2)), run(normal(2, 1, 10), jnp.array([0.0, 0.8]))
    plain = unet.apply({"params": params}, *inputs)
    np.testing.assert_allclose(first, plain, atol=1e-5)
    np.testing.assert_allclose(second[0], plain[0], atol=1e-5)
    assert np.abs(second[1] - plain[1]).max() > 0.01
    assert run._cache_size() == 1
    if remat == "full":
        gradient = jax.grad(lambda x: jnp.sum(run(x, jnp.array([0.0, 1.0])) ** 2))(images)
        assert not np.any(gradient[0]) and np.all(np.abs(gradient[1]).max() > 1e-3)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    save_file({"image_proj.proj.weight": np.zeros((4, 4), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="contains no IP-Adapter: there is no 'ip_adapter.1.to_k_ip.weight'"):
        IPAdapter.from_single_file(tmp_path / "a.safetensors")
    other = {"ip_adapter.1.to_k_ip.weight": np.zeros((4, 4), np.float32), "image_proj.x": np.zeros(3, np.float32)}
    save_file(other, tmp_path / "b.safetensors")
    with pytest.raises(WeightsError, match="cannot infer the configuration of its IP-Adapter from its tensors"):
        IPAdapter.from_single_file(tmp_path / "b.safetensors")
    with pytest.raises(WeightsError, match="holds no IP-Adapter whose configuration its tensors show.*'ip_adapter"):
        read_ip_adapter(tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"is a folder.*from_pretrained opens folders"):
        IPAdapter.from_single_file(tmp_path)
