"""What the exponential integrators share: weights that are exact for polynomials, where a run may begin and end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffuse_jax import schedulers
from diffuse_jax.schedulers.multistep import adams_weights, exponential_step
from diffuse_jax.schedulers.table import Table


def gaussian_error(table: Table, end: tuple[float, float] = (1.0, 0.0), std: float = 0.6) -> float:
    """Relative error of a run to the level ``end`` with the best network for data N(0, std^2), which is linear."""
    rows = iter(zip(table.levels, table.to_x0, strict=False))

    def model(x: np.ndarray, t: float) -> np.ndarray:
        (alpha, sigma), (of_sample, of_output) = next(rows)
        x0 = alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x
        return (x0 - of_sample * x) / of_output

    # The ODE keeps the sample in units of the spread of all noisy samples.
    spread = [np.hypot(alpha * std, sigma) for alpha, sigma in (table.levels[0], end)]
    return abs(table.run(model, np.array([spread[0]]))[-1].item() / spread[1] - 1)


@pytest.mark.parametrize("rate", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("h", [1e-3, 0.3, 8.0])
@pytest.mark.parametrize("nodes", [(0.0,), (0.0, -0.4), (0.0, -0.4, -1.0), (0.3, 0.0, -0.4, -1.0)])
def test_adams_weights_integrate_polynomials(nodes: tuple[float, ...], h: float, rate: float) -> None:
    x, w = np.polynomial.legendre.leggauss(60)
    x, w = (x + 1) * h / 2, w * h / 2
    points = h * np.array(nodes)
    weights = adams_weights(points, h, rate)
    for degree in range(len(nodes)):
        want = np.sum(w * (x / h) ** degree * np.exp(-rate * x))
        assert np.sum(weights * (points / h) ** degree) == pytest.approx(want, rel=1e-11)


def test_adams_weights_of_an_endless_step() -> None:
    assert adams_weights([0.0], np.inf, 2.0) == pytest.approx([0.5])


def test_steps_from_and_to_clean_samples() -> None:
    noisy, clean = np.array([0.6, 0.8]), np.array([1.0, 0.0])
    p, q, u = exponential_step(noisy, clean, data=True)
    assert (p, q, u) == (0.0, 1.0, -np.inf), "the result is the predicted sample"
    with pytest.raises(ValueError, match="cannot step to sigma 0, .*it extrapolates noise.*above 0"):
        exponential_step(noisy, clean, data=False)
    with pytest.raises(ValueError, match="cannot step from sigma 0, .*above 0"):
        exponential_step(clean, noisy, data=True)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min"}),
        ("UniPCMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ],
)
def test_explicit_sigmas_may_end_at_zero(name: str, config: dict[str, Any]) -> None:
    sigmas = np.append(np.geomspace(14.6, 0.05, 20), 0.0)
    table = getattr(schedulers, name)(**config).table(sigmas=sigmas)
    np.testing.assert_allclose(table.levels[:-1, 1] / table.levels[:-1, 0], sigmas[:-1])
    assert np.isfinite(table.rows).all()
    assert gaussian_error(table) < 0.02


def test_noise_cannot_be_extrapolated_to_a_clean_sample() -> None:
    noise = schedulers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min")
    for scheduler in (noise, schedulers.DEISMultistepScheduler()):
        with pytest.raises(ValueError, match="cannot step to sigma 0"):
            scheduler.table(sigmas=[3.0, 1.0, 0.0])
        assert np.isfinite(scheduler.table(sigmas=[3.0, 1.0, 0.1]).rows).all()


@pytest.mark.parametrize("name", ["DEISMultistepScheduler", "UniPCMultistepScheduler"])
def test_one_step_of_spaced_sigmas_goes_somewhere(name: str) -> None:
    """The smallest sigma is both the last of the spacing and the end; with one step it is only the end."""
    scheduler = schedulers.Scheduler.from_config(
        {"_class_name": name, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    )
    grid = scheduler.grid(1, timesteps=None, sigmas=None)
    sigma = scheduler.sigma_table
    assert grid.source[0, 1] / grid.source[0, 0] == pytest.approx(sigma[-1])
    assert grid.target[0, 1] / grid.target[0, 0] == pytest.approx(sigma[0])
