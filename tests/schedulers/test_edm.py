"""Samplers of EDM networks: levels, preconditioning, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffuse_jax import schedulers

NAMES = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")


@pytest.mark.parametrize("name", NAMES)
def test_levels_run_between_the_ends_of_the_range(name: str) -> None:
    for spacing in ("karras", "exponential"):
        scheduler = getattr(schedulers, name)(sigma_schedule=spacing, sigma_min=0.1, sigma_max=30.0)
        levels = scheduler.table(7).levels
        assert levels[0, 1] == pytest.approx(30.0)
        assert levels[-2, 1] == pytest.approx(0.1)
        assert levels[-1, 1] == 0
        assert scheduler.table(1).levels[0, 1] == pytest.approx(30.0)
    assert len(scheduler.table(3000)) == 3000, "there is no training schedule to run out of"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_a_run_that_ends_at_sigma_min_takes_no_step_upwards(name: str, spacing: str) -> None:
    """Rounding puts the last level of a spacing on either side of ``sigma_min``."""
    for low in np.linspace(0.1, 0.9, 41):
        cls = getattr(schedulers, name)
        table = cls(sigma_schedule=spacing, sigma_min=float(low), final_sigmas_type="sigma_min").table(2)
        assert np.all(np.isfinite(table.rows)), low
        assert np.all(np.diff(table.levels[:, 1]) <= 0), low


@pytest.mark.parametrize("name", NAMES)
def test_timesteps_and_sigmas_say_the_same(name: str) -> None:
    scheduler = getattr(schedulers, name)()
    table = scheduler.table(8)
    from_sigmas = scheduler.table(sigmas=[*table.levels[:-1, 1], 0.0])
    from_timesteps = scheduler.table(timesteps=table.timesteps)
    for other in (from_sigmas, from_timesteps):
        np.testing.assert_allclose(other.rows, table.rows, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(other.timesteps, table.timesteps)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_preconditioning_gives_unit_variance(name: str, prediction_type: str) -> None:
    """For data of spread sigma_data: of what the network sees, and of what it should return."""
    scheduler = getattr(schedulers, name)(prediction_type=prediction_type)
    table, spread = scheduler.table(20), scheduler.sigma_data
    for (of_sample, of_output), (_, sigma), scale in zip(table.to_x0, table.levels, table.input_scale, strict=False):
        x0, noise = np.array([spread, 0.0]), np.array([0.0, 1.0])  # in independent directions of length 1
        x = x0 + sigma * noise
        assert np.linalg.norm(scale * x) == pytest.approx(1)
        output = (x0 - of_sample * x) / of_output
        assert np.linalg.norm(output) == pytest.approx(1)
        assert output @ x == pytest.approx(0, abs=1e-6), "the best guess from the sample alone is c_skip * x"


def test_noising_and_velocity_at_the_times_of_the_network() -> None:
    x0, noise = np.full((2, 3), 0.5, np.float32), np.ones((2, 3), np.float32)
    for name in NAMES:
        scheduler = getattr(schedulers, name)()
        t = scheduler.timestep(np.array([0.5, 40.0])).astype(np.float32)
        np.testing.assert_allclose(scheduler.add_noise(x0, noise, t)[:, 0], [1.0, 40.5], rtol=1e-4)
        levels = scheduler.train_levels()
        np.testing.assert_allclose(levels[[0, -1], 1], [scheduler.sigma_min, scheduler.sigma_max], rtol=1e-10)


def test_churn_adds_the_noise_of_the_raised_level() -> None:
    table = schedulers.EDMEulerScheduler().table(10, s_churn=2.0, s_noise=1.5)
    raised = table.levels[:-1, 1] * 1.2
    drawn = table.rows[:, 0, -1]
    # After the noise, x_hat moves to the next level along a slope that keeps c_skip of it.
    keep = 0.25 / (raised**2 + 0.25)
    share = table.levels[1:, 1] / raised
    want = 1.5 * np.sqrt(raised**2 - table.levels[:-1, 1] ** 2) * (share + (1 - share) * keep)
    np.testing.assert_allclose(drawn, want)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedulers.EDMEulerScheduler(sigma_min=2.0, sigma_max=1.0), "down to sigma_min above 0, got 1 and 2"),
        (lambda: schedulers.EDMEulerScheduler(sigma_min=0.0), "above 0, got 80 and 0"),
        (lambda: schedulers.EDMEulerScheduler(sigma_schedule="cosine"), r"one of \['karras', 'exponential'\]"),
        (lambda: schedulers.EDMEulerScheduler(beta_start=0.1), "has no setting beta_start"),
        (
            lambda: schedulers.EDMDPMSolverMultistepScheduler(algorithm_type="dpmsolver"),
            "algorithm_type must be one of",
        ),
        (lambda: schedulers.CosineDPMSolverMultistepScheduler(solver_order=3), r"one of \[1, 2\], got 3"),
        (
            lambda: schedulers.CosineDPMSolverMultistepScheduler(algorithm_type="dpmsolver++"),
            "no setting algorithm_type",
        ),
        (lambda: schedulers.EDMEulerScheduler().table(0), "a whole number from 1 to 100000, got 0"),
        (lambda: schedulers.EDMEulerScheduler().table(timesteps=[2.0, 1.0]), "between -1.55365 and 1.09551, got 2"),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
