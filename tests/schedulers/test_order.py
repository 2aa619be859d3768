"""Deterministic samplers converge to the exact path at their order, on data whose score is known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import sampler_order as problem
from diffuse_jax.schedulers import DDPMScheduler


@pytest.mark.parametrize("method", problem.METHODS, ids=lambda m: f"{m.scheduler}, {m.label}")
def test_error_falls_at_the_order_of_the_method(method: problem.Method) -> None:
    row = problem.measure(method)
    errors = [row[f"error at {n}"] for n in problem.STEPS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * np.ptp(problem.MEANS)
    assert row["measured_order"] > method.order - 0.5


def test_quantiles_invert_the_distribution_function() -> None:
    for level in np.array([[1.0, 0.0], [0.6, 0.8], [1.0, 14.6]]):
        x = problem.quantile(problem.QUANTILES, level)
        np.testing.assert_allclose(problem.cdf(x, level), problem.QUANTILES, atol=1e-12)


def test_exact_network_is_the_mean_over_the_posterior(rng: np.random.Generator) -> None:
    """E[x0 | x] averaged over the noisy marginal is the mean of the data (law of total expectation)."""
    level = np.array([0.6, 0.8])
    q = (np.arange(20000) + 0.5) / 20000
    x0 = problem.exact_x0(problem.quantile(q, level), level)
    assert x0.mean() == pytest.approx(problem.WEIGHTS @ problem.MEANS, abs=1e-3)


def test_ancestral_sampling_reaches_the_distribution(rng: np.random.Generator) -> None:
    """The stochastic reference: a thousand steps of DDPM from noise give the data's quantiles."""
    table = DDPMScheduler(clip_sample=False, **problem.SD).table(1000)
    noise = rng.standard_normal((1000, 4000))
    out = np.sort(problem.solve(table, rng.standard_normal(4000), noise)[-1])
    q = (np.arange(4000) + 0.5) / 4000
    assert np.abs(out - problem.quantile(q, np.array([1.0, 0.0]))).mean() < 0.06
