"""Laws of the training targets and of the Min-SNR weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.schedulers import DDPMScheduler
from diffuse_jax.schedulers.noise_schedule import predict_x0
from diffuse_jax.training.objective import min_snr_weight, snr_table, target, weighted_error

KINDS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_means_the_clean_sample(kind: str, rng: np.random.Generator) -> None:
    scheduler = DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x0, noise = jnp.asarray(rng.standard_normal((2, 5, 4, 4, 3)), jnp.float32)
    t = jnp.array([0, 10, 300, 700, 999])
    alpha = np.sqrt(scheduler.alpha_bar)[np.asarray(t)].reshape(-1, 1, 1, 1)
    noisy = scheduler.add_noise(x0, noise, t)
    back = predict_x0(kind, noisy, target(scheduler, x0, noise, t), alpha, np.sqrt(1 - alpha**2))
    np.testing.assert_allclose(back, x0, atol=2e-4)


def test_unknown_target_is_an_error() -> None:
    scheduler = DDPMScheduler()
    object.__setattr__(scheduler, "prediction_type", "score")
    with pytest.raises(ValueError, match="score"):
        target(scheduler, jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1)), jnp.zeros(1, int))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_at_most_one_and_vanish_as_gamma_grows(kind: str) -> None:
    snr = jnp.asarray(snr_table(DDPMScheduler()))
    weights = min_snr_weight(snr, 5.0, kind)
    assert float(weights.max()) <= 1.0
    assert float(weights.min()) > 0.0
    np.testing.assert_array_equal(min_snr_weight(snr, float("inf"), kind), jnp.ones_like(snr))


def test_noise_weights_are_those_of_the_clean_sample_times_the_ratio() -> None:
    """The paper: weights min(snr, gamma) on the error of x0; an error d of x0 is an error sqrt(snr) d of the noise."""
    snr = jnp.array([0.01, 1.0, 4.9, 5.1, 400.0])
    np.testing.assert_allclose(min_snr_weight(snr, 5.0, "epsilon") * snr, jnp.minimum(snr, 5.0), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_pure_noise_has_weight_one(kind: str) -> None:
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    snr = jnp.asarray(snr_table(scheduler))
    assert float(snr[-1]) == 0.0
    weights = jax.jit(min_snr_weight, static_argnums=2)(snr, 5.0, kind)
    assert bool(jnp.isfinite(weights).all())
    assert float(weights[-1]) == 1.0


def test_error_is_weighted_per_sample() -> None:
    prediction, wanted = jnp.array([[1.0, 3.0], [2.0, 2.0]]), jnp.zeros((2, 2))
    assert float(weighted_error(prediction, wanted, jnp.array([0.0, 0.5]))) == pytest.approx(
        1.0
    )  # (0 * 5 + 0.5 * 4) / 2
    assert float(weighted_error(prediction, wanted, None)) == pytest.approx(4.5)
    half = weighted_error(prediction.astype(jnp.bfloat16), wanted.astype(jnp.bfloat16), None)
    assert half.dtype == jnp.float32
