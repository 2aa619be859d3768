"""Laws of the consistency function, for any network."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from diffuse_jax.models import consistency_denoiser

wild = lambda x, t: 100 * jnp.sin(3 * x) + t.reshape(-1, 1, 1)


def test_clean_samples_stay_as_they_are(rng: np.random.Generator) -> None:
    """The boundary condition of Song et al. 2023, equation 4."""
    x = jnp.asarray(rng.standard_normal((3, 4, 5)), jnp.float32)
    denoise = consistency_denoiser(wild, sigma_data=0.7, sigma_min=0.01)
    np.testing.assert_array_equal(denoise(x, 0.01), x)


def test_inputs_and_targets_of_networks_have_unit_variance(rng: np.random.Generator) -> None:
    """Karras et al. 2022, appendix B.6: with data of ``sigma_data`` the network's input has unit variance at every
    level, and (where ``sigma_min`` does not matter) so has the answer it must give to be right."""
    seen: list = []
    clean = 0.7 * rng.standard_normal((1, 400, 500))
    for sigma in (0.3, 3.0, 30.0):
        noisy = jnp.asarray(clean + sigma * rng.standard_normal(clean.shape), jnp.float32)
        consistency_denoiser(lambda x, t: seen.append(x) or x, sigma_data=0.7)(noisy, sigma)
        np.testing.assert_allclose(seen[-1].std(), 1, atol=0.01)
        skip = consistency_denoiser(lambda x, t: jnp.zeros_like(x), sigma_data=0.7, sigma_min=0)
        out = consistency_denoiser(lambda x, t: jnp.ones_like(x), sigma_data=0.7, sigma_min=0)
        c_skip_x, c_out = skip(noisy, sigma), out(jnp.zeros_like(noisy), sigma)
        np.testing.assert_allclose(((clean - c_skip_x) / c_out).std(), 1, atol=0.01)


def test_every_sample_has_its_own_level_and_its_own_conditions(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((2, 4, 5)), jnp.float32)
    y = jnp.array([1.0, 2.0])
    denoise = consistency_denoiser(lambda x, t, y: wild(x, t) * y.reshape(-1, 1, 1))
    both = denoise(x, jnp.array([0.5, 8.0]), y)
    alone = [denoise(x[i : i + 1], sigma, y[i : i + 1]) for i, sigma in enumerate((0.5, 8.0))]
    np.testing.assert_allclose(both, jnp.concatenate(alone), rtol=1e-6)


def test_time_is_a_quarter_of_a_thousand_logarithms() -> None:
    """The known times at the ends of the original training range, sigma 0.002 and 80."""
    times = []
    denoise = consistency_denoiser(lambda x, t: times.append(t) or x)
    denoise(jnp.zeros((2, 1, 1)), jnp.array([0.002, 80.0]))
    np.testing.assert_allclose(times[0], [-1553.652, 1095.507], rtol=1e-6)
