"""What the autoencoder promises beyond its outputs: the posterior's laws, scaling and its inverse, clear errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.models import AutoencoderKL, presets
from diffuse_jax.models.autoencoder_kl import Posterior, scale_latents, unscale_latents
from tests.models.test_precision import VAE


def test_samples_have_the_mean_and_deviation_of_the_posterior() -> None:
    posterior = Posterior(jnp.full((64, 32, 32, 2), 3.0), jnp.full((64, 32, 32, 2), 2 * np.log(0.5)))
    draws = np.asarray(posterior.sample(jax.random.key(0)), np.float64)
    assert abs(draws.mean() - 3) < 0.01
    assert abs(draws.std() - 0.5) < 0.01
    np.testing.assert_array_equal(posterior.mode(), posterior.mean)


def test_with_a_key_per_image_a_sample_does_not_depend_on_its_batch(rng: np.random.Generator) -> None:
    posterior = Posterior(*jnp.asarray(rng.standard_normal((2, 3, 4, 5, 2)), jnp.float32))
    keys = jax.random.split(jax.random.key(0), 3)
    draws = posterior.sample(keys)
    for i in range(3):
        alone = Posterior(posterior.mean[i : i + 1], posterior.logvar[i : i + 1])
        np.testing.assert_array_equal(alone.sample(keys[i : i + 1]), draws[i : i + 1])
    noise = (draws - posterior.mean) / jnp.exp(0.5 * posterior.logvar)
    assert not np.allclose(noise[0], noise[1])
    np.testing.assert_array_equal(posterior.sample(keys[::-1])[1], draws[1])


@pytest.mark.parametrize("key", [jax.random.split(jax.random.key(0), 2), jax.random.PRNGKey(0), jnp.zeros(3)])
def test_keys_of_another_batch_are_refused(key: jax.Array) -> None:
    posterior = Posterior(jnp.zeros((3, 4, 5, 2)), jnp.zeros((3, 4, 5, 2)))
    with pytest.raises(ValueError, match=r"one typed key .* or \[3\] of them, one per image; got"):
        posterior.sample(key)


def test_divergence_is_zero_for_the_standard_normal_and_known_for_others() -> None:
    shape = (2, 3, 4, 5)
    np.testing.assert_allclose(Posterior(jnp.zeros(shape), jnp.zeros(shape)).kl(), 0)
    np.testing.assert_allclose(Posterior(jnp.full(shape, 2.0), jnp.zeros(shape)).kl(), 60 * 2.0)  # half the square


@pytest.mark.parametrize(
    "config", [presets.SDXL_VAE, VAE.replace(latents_mean=(1.0, -1.0, 0.5, 0.0), latents_std=(2.0, 1.0, 0.5, 3.0))]
)
def test_unscaling_undoes_scaling(config: object, rng: np.random.Generator) -> None:
    latents = jnp.asarray(rng.standard_normal((2, 3, 3, 4)), jnp.float32)
    scaled = scale_latents(latents, config)
    assert not np.allclose(scaled, latents)
    np.testing.assert_allclose(unscale_latents(scaled, config), latents, rtol=1e-5, atol=1e-6)


def test_scale_counts_pixels_per_latent() -> None:
    assert presets.SD_VAE.scale == 8
    assert presets.X4_UPSCALER_VAE.scale == 4


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (1, 3, 8, 8), r"images must be \[B,H,W,3\]"),
        ("encode", (1, 8, 9, 3), "multiples of 2"),
        ("decode", (1, 4, 8, 8), r"latents must be \[B,h,w,4\]"),
    ],
)
def test_wrong_shapes_are_refused_while_tracing(method: str, shape: tuple[int, ...], message: str) -> None:
    model = AutoencoderKL(VAE)
    apply = lambda p, x: model.apply({"params": p}, x, method=method)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(apply, model.shapes(), jax.ShapeDtypeStruct(shape, jnp.float32))
