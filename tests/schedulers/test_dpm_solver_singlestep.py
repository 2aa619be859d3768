"""DPM-Solver, singlestep: the orders of a run's evaluations, entering a block late, accuracy."""

from __future__ import annotations

import numpy as np
import pytest

from diffuse_jax.schedulers import DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler
from diffuse_jax.schedulers.table import Table
from tests.schedulers.test_multistep import gaussian_error

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def orders(table: Table) -> list[int]:
    """How many outputs reach back: the older and the oldest of a block are in memory."""
    return [3 if row[0, 4] else 2 if row[0, 3] else 1 for row in table.rows]


@pytest.mark.parametrize(
    ("order", "n", "lower", "last", "want"),
    [
        (1, 3, False, "zero", [1, 1, 1]),
        (2, 1, False, "zero", [1]),
        (2, 4, False, "zero", [1, 2, 1, 1]),
        (2, 5, False, "zero", [1, 2, 1, 2, 1]),
        (2, 4, False, "sigma_min", [1, 2, 1, 2]),
        (2, 4, True, "sigma_min", [1, 2, 1, 1]),
        (3, 6, False, "zero", [1, 2, 3, 1, 2, 1]),
        (3, 7, False, "zero", [1, 2, 3, 1, 2, 3, 1]),
        (3, 8, False, "zero", [1, 2, 3, 1, 2, 3, 1, 1]),
        (3, 6, False, "sigma_min", [1, 2, 3, 1, 2, 3]),
        (3, 6, True, "sigma_min", [1, 2, 3, 1, 2, 1]),
        (3, 8, True, "sigma_min", [1, 2, 3, 1, 2, 3, 1, 2]),
    ],
)
def test_orders(order: int, n: int, lower: bool, last: str, want: list[int]) -> None:
    scheduler = DPMSolverSinglestepScheduler(solver_order=order, lower_order_final=lower, final_sigmas_type=last)
    assert orders(scheduler.table(n)) == want


def test_a_block_may_be_entered_late() -> None:
    scheduler = DPMSolverSinglestepScheduler(solver_order=3)
    assert orders(scheduler.table(10, strength=0.9)) == [1, 2, 1, 2, 3, 1, 2, 3, 1]
    assert orders(scheduler.table(10, strength=0.8)) == [1, 1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize("kind", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize(("order", "solver"), [(1, "heun"), (2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun")])
def test_orders_of_accuracy(kind: str, order: int, solver: str) -> None:
    scheduler = DPMSolverSinglestepScheduler(
        **SD, solver_order=order, solver_type=solver, algorithm_type=kind, final_sigmas_type="sigma_min"
    )

    def error(n: int) -> float:
        sigmas = np.geomspace(14.6, 0.03, n + 1)
        end = np.hypot(1, sigmas[-1])
        return gaussian_error(scheduler.table(sigmas=sigmas), (1 / end, sigmas[-1] / end))

    assert np.log2(error(60) / error(120)) > order - 0.3


# Not "heun" of order 3: its third-order term has the sign of diffusers, with which a run of many steps grows.
@pytest.mark.parametrize(
    ("solver", "order"), [("midpoint", 1), ("midpoint", 2), ("midpoint", 3), ("heun", 1), ("heun", 2)]
)
def test_stochastic_variance(solver: str, order: int) -> None:
    """With fresh noise in every evaluation all orders converge, with order 1, to the spread of the data."""
    config = SD | {"algorithm_type": "sde-dpmsolver++", "solver_type": solver, "solver_order": order}

    def error(n: int, std: float = 0.6) -> float:
        table = DPMSolverSinglestepScheduler(**config).table(sigmas=np.append(np.geomspace(14.6, 0.01, n), 0.0))
        rows = iter(zip(table.levels, table.to_x0, strict=False))

        def model(x: np.ndarray, t: float) -> np.ndarray:
            (alpha, sigma), (of_sample, of_output) = next(rows)
            return (alpha * std**2 / (alpha**2 * std**2 + sigma**2) - of_sample) / of_output * x

        # Everything is linear: the final variance is the sum of squared responses to the start and to each draw.
        start = np.zeros((n + 1, 1))
        start[-1] = np.hypot(table.levels[0, 0] * std, table.levels[0, 1])
        response = table.run(model, start, list(np.eye(n, n + 1)[:, :, None]))[-1]
        return float(abs(np.sqrt((response**2).sum()) / std - 1))

    assert error(240) < 0.05
    assert error(120) / error(240) == pytest.approx(2, abs=0.25)


def test_order_one_is_that_of_the_multistep_sampler() -> None:
    single = DPMSolverSinglestepScheduler(**SD, solver_order=1).table(9)
    multi = DPMSolverMultistepScheduler(**SD, solver_order=1).table(9)
    np.testing.assert_allclose(single.rows[:, 0], multi.rows[:, 0], atol=1e-14)


def test_settings_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="DPMSolverSinglestepScheduler has no setting timestep_spacing"):
        DPMSolverSinglestepScheduler(timestep_spacing="leading")
    with pytest.raises(ValueError, match=r"algorithm_type must be one of .* got 'sde-dpmsolver'"):
        DPMSolverSinglestepScheduler(algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min")
    with pytest.raises(ValueError, match="set final_sigmas_type='sigma_min'"):
        DPMSolverSinglestepScheduler(algorithm_type="dpmsolver")
