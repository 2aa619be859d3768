"""DPM-Solver++ backwards: where it starts and ends, that a round trip is the identity, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from diffuse_jax.schedulers import DPMSolverMultistepInverseScheduler, DPMSolverMultistepScheduler
from tests.schedulers.test_multistep import gaussian_error

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
INVERSE = DPMSolverMultistepInverseScheduler(**SD)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_noise_grows(spacing: str) -> None:
    table = INVERSE.replace(timestep_spacing=spacing).table(10)
    assert np.all(np.diff(table.timesteps) > 0)
    assert np.all(np.diff(table.levels[:, 1]) >= 0)
    np.testing.assert_allclose(table.levels[-1], INVERSE.train_levels()[-1])
    assert table.init_scale == 1.0


@pytest.mark.parametrize("order", [1, 2, 3])
def test_gaussian_end_point(order: int) -> None:
    table = INVERSE.replace(solver_order=order).table(200)
    assert gaussian_error(table, tuple(table.levels[-1])) < 0.02


def test_inversion_and_sampling_return_to_the_start() -> None:
    """Inversion, then sampling along the same levels, gives the image back: the better, the more steps."""
    rng = np.random.default_rng(0)
    model = lambda x, t: 0.8 * np.tanh(x) + 0.1 * np.sin(x + t / 300)
    image = rng.standard_normal((1, 20))

    def error(n: int) -> float:
        sigmas = np.geomspace(0.03, 14.0, n + 1)
        noise = INVERSE.table(sigmas=sigmas).run(model, image)[-1]
        forward = DPMSolverMultistepScheduler(**SD, final_sigmas_type="sigma_min")
        return float(np.abs(forward.table(sigmas=sigmas[::-1]).run(model, noise)[-1] - image).max())

    errors = [error(n) for n in (50, 100, 200)]
    assert errors[-1] < 0.01
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3, "second order"


def test_strength_runs_the_first_steps() -> None:
    whole, part = INVERSE.table(50), INVERSE.table(50, strength=0.8)
    assert len(part) == 40
    np.testing.assert_array_equal(part.rows, whole.rows[:40])
    np.testing.assert_array_equal(part.levels, whole.levels[:41])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"timesteps": [500, 20]}, "timesteps must ascend, but entry 1 is 20 after 500"),
        ({"timesteps": [500, 1000]}, "timesteps must lie between 0 and 999, got 500 ... 1000"),
        ({"sigmas": [3.0, 1.0]}, "sigmas must ascend, but entry 1 is 1 after 3"),
        ({"sigmas": [0.0, 1.0, 3.0]}, "cannot step from sigma 0"),
        ({"num_inference_steps": 5, "strength": 0.1}, "leaves none to run; use a strength of at least 0.2"),
        ({"num_inference_steps": 5, "denoising_start": 0.5}, "runs from an image to noise .* give strength="),
        ({"num_inference_steps": 5, "denoising_end": 0.5}, "runs from an image to noise .* give strength="),
    ],
)
def test_impossible_requests(request_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        INVERSE.table(**request_)


def test_noise_cannot_be_added_backwards() -> None:
    with pytest.raises(ValueError, match=r"'sde-dpmsolver\+\+' .*cannot run backwards; use 'dpmsolver\+\+'"):
        DPMSolverMultistepInverseScheduler(algorithm_type="sde-dpmsolver++")


def test_explicit_timesteps_and_sigmas() -> None:
    by_time = INVERSE.table(timesteps=[0, 100, 400, 900])
    sigma = INVERSE.sigma_table
    by_sigma = INVERSE.table(sigmas=[*sigma[[0, 100, 400, 900]], sigma[-1]])
    np.testing.assert_allclose(by_time.rows, by_sigma.rows, atol=1e-12)
    np.testing.assert_allclose(by_time.timesteps, by_sigma.timesteps, atol=1e-9)
