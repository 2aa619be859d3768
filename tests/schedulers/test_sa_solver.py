"""SA-Solver: the spread of Gaussian data for every amount of noise, accuracy without noise, its option ``tau``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffuse_jax.schedulers import SASolverScheduler
from diffuse_jax.schedulers.sa_solver import middle_third
from tests.schedulers.test_multistep import gaussian_error

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = ("data_prediction", "noise_prediction")


def spread(n: int, tau: Any, std: float = 0.6, **config: Any) -> float:
    """Standard deviation at the end of a run, over that of the noisy data there."""
    sigmas = np.geomspace(14.6, 0.02, n + 1)
    table = SASolverScheduler(**SD, **config).table(sigmas=sigmas, tau=tau)
    rows = iter(zip(table.levels, table.to_x0, strict=False))

    def model(x: np.ndarray, t: float) -> np.ndarray:
        (alpha, sigma), (of_sample, of_output) = next(rows)
        return (alpha * std**2 / (alpha**2 * std**2 + sigma**2) - of_sample) / of_output * x

    # Everything is linear: the final variance is the sum of squared responses to the start and to each draw.
    start = np.zeros((n + 1, 1))
    start[-1] = np.hypot(table.levels[0, 0] * std, table.levels[0, 1])
    response = table.run(model, start, list(np.eye(n, n + 1)[:, :, None]))[-1]
    end = np.hypot(std, sigmas[-1]) / np.hypot(1, sigmas[-1])
    return float(np.sqrt((response**2).sum()) / end)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, middle_third])
def test_any_amount_of_noise_gives_the_spread_of_the_data(kind: str, tau: Any) -> None:
    errors = [abs(spread(n, tau, algorithm_type=kind) - 1) for n in (100, 400)]
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("kind", KINDS)
def test_orders_without_noise(kind: str) -> None:
    """The corrector adds one to the predictor's order; the first step has a lower one."""

    def error(n: int, order: int) -> float:
        sigmas = np.geomspace(14.6, 0.02, n + 1)
        config = SD | {"algorithm_type": kind, "predictor_order": order, "corrector_order": order + 1}
        end = np.hypot(1, sigmas[-1])
        table = SASolverScheduler(**config, lower_order_final=False).table(sigmas=sigmas, tau=0.0)
        return gaussian_error(table, (1 / end, sigmas[-1] / end))

    errors = [error(80, order) for order in (1, 2, 3)]
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2
    assert np.log2(error(80, 1) / error(160, 1)) > 0.9
    assert np.log2(error(80, 2) / error(160, 2)) > 1.9


def test_noise_is_drawn_where_it_is_added() -> None:
    scheduler = SASolverScheduler(**SD)
    assert not scheduler.table(20, tau=0).rows[:, :, -1].any()
    drawn = scheduler.table(20).rows[:, :, -1].any(axis=1)
    np.testing.assert_array_equal(drawn, [middle_third(t) > 0 for t in scheduler.table(20).timesteps])


def test_sigmas_may_end_at_zero() -> None:
    sigmas = np.append(np.geomspace(14.6, 0.02, 40), 0.0)
    for order in (1, 2, 4):
        scheduler = SASolverScheduler(**SD, predictor_order=order, lower_order_final=False)
        table = scheduler.table(sigmas=sigmas, tau=0)
        assert np.isfinite(table.rows).all()
        assert gaussian_error(table) < 0.05
    with pytest.raises(ValueError, match="cannot step to sigma 0"):
        SASolverScheduler(algorithm_type="noise_prediction").table(sigmas=sigmas)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SASolverScheduler(tau_func=lambda t: 1.0), r"tau_func must be None, got .*use plan\(\.\.\., tau=\)"),
        (lambda: SASolverScheduler(predictor_order=5), r"predictor_order must be one of \[1, 2, 3, 4\], got 5"),
        (lambda: SASolverScheduler(corrector_order=0), "corrector_order must be a whole number from 1 to .*, got 0"),
        (lambda: SASolverScheduler().table(5, tau=-1), "tau must be at least 0, got -1.0 at timestep"),
        (lambda: SASolverScheduler().table(5, tau=lambda t: float("nan")), "tau must be a finite number, got nan"),
    ],
)
def test_impossible_values_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
