"""Laws of the distance between images in a network's features."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffuse_jax.training.perceptual import VGG16, perceptual_distance, read_features, vgg16_maps
from diffuse_jax.weights import WeightsError

WIDTHS = (4, 4, 4, 4, 4)


def vgg16_state(rng: np.random.Generator, widths: tuple[int, ...] = WIDTHS) -> dict[str, np.ndarray]:
    """Random weights under torchvision's names, of the network or of a narrower one."""
    state, inputs = {}, 3
    for width, places in zip(widths, VGG16, strict=True):
        for place in places:
            weight = rng.standard_normal((width, inputs, 3, 3)) * np.sqrt(2 / (9 * inputs))
            state[f"features.{place}.weight"] = weight.astype(np.float32)
            state[f"features.{place}.bias"] = rng.normal(0, 0.1, width).astype(np.float32)
            inputs = width
    return state


def two_images(rng: np.random.Generator) -> tuple[jax.Array, jax.Array]:
    return tuple(jnp.asarray(rng.uniform(-1, 1, (2, 32, 32, 3)), jnp.float32) for _ in range(2))  # type: ignore[return-value]


def test_the_perceptual_distance_is_symmetric(tmp_path: Path, rng: np.random.Generator) -> None:
    save_file(vgg16_state(rng), tmp_path / "vgg16.safetensors")
    network, params = read_features(tmp_path / "vgg16.safetensors")
    x, y = two_images(rng)
    distance = jax.jit(lambda x, y: perceptual_distance(network, params, x, y))
    np.testing.assert_array_equal(distance(x, x), 0)
    np.testing.assert_allclose(distance(x, y), distance(y, x), rtol=1e-5)
    assert float(distance(x, y).min()) > 0
    # between unit vectors with no negative number the square is at most 2, and there are five layers
    assert float(distance(x, y).max()) < 2 * len(VGG16)


def test_weights_of_the_file_count(tmp_path: Path, rng: np.random.Generator) -> None:
    """All weights 2 are twice the distance without any; LPIPS's names of the layers are read too."""
    state = vgg16_state(rng)
    renamed = {name.replace("features.", "net.slice1."): array for name, array in state.items()}
    weights = {f"lin{i}.model.1.weight": np.full((1, width, 1, 1), 2, np.float32) for i, width in enumerate(WIDTHS)}
    save_file(state, tmp_path / "plain.safetensors")
    save_file(renamed | weights, tmp_path / "lpips.safetensors")
    plain, lpips = (read_features(tmp_path / f"{name}.safetensors") for name in ("plain", "lpips"))
    x, y = two_images(rng)
    np.testing.assert_allclose(perceptual_distance(*lpips, x, y), 2 * perceptual_distance(*plain, x, y), rtol=1e-5)


def test_features_that_are_all_zero_have_a_gradient(tmp_path: Path, rng: np.random.Generator) -> None:
    dead = {name: -np.abs(array) for name, array in vgg16_state(rng).items()}
    save_file(dead, tmp_path / "dead.safetensors")
    network, params = read_features(tmp_path / "dead.safetensors")
    white = jnp.full((1, 16, 16, 3), 0.99)
    assert all(float(f.max()) == 0 for f in vgg16_maps(params["layers"], white + 2)[1:])
    gradient = jax.grad(lambda y: perceptual_distance(network, params, white, y).sum())(white * 0.9)
    assert bool(jnp.isfinite(gradient).all())


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"conv1.weight": np.zeros((4, 3, 3, 3), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"other\.safetensors: not torchvision's VGG16 or MobileNetV2, nor.*conv1"):
        read_features(tmp_path / "other.safetensors")
