"""UniPC: another sampler as its predictor, levels within a range, the order of a step to a clean sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffuse_jax.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    Scheduler,
    UniPCMultistepScheduler,
)
from tests.schedulers.test_multistep import gaussian_error

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIGMAS = np.append(np.geomspace(14.6, 0.03, 60), 0.0)


def test_without_correction_the_predictor_is_the_sampler() -> None:
    dpm = DPMSolverMultistepScheduler(**SD)
    alone = dpm.table(sigmas=SIGMAS)
    unipc = UniPCMultistepScheduler(**SD, disable_corrector=tuple(range(60)))
    table = unipc.table(sigmas=SIGMAS, solver_p=dpm)
    model = lambda x, t: 0.8 * np.tanh(x) + 0.1 * np.sin(x + t / 300)
    start = np.random.default_rng(0).standard_normal((1, 20))
    np.testing.assert_allclose(table.run(model, start), alone.run(model, start), atol=1e-12)


def test_correction_makes_it_more_accurate() -> None:
    first = DPMSolverMultistepScheduler(**SD, solver_order=1)
    table = UniPCMultistepScheduler(**SD, solver_order=3).table(sigmas=SIGMAS, solver_p=first)
    assert gaussian_error(table) < gaussian_error(first.table(sigmas=SIGMAS)) / 5


def test_a_range_of_sigmas() -> None:
    for flag in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        table = UniPCMultistepScheduler(**SD, **{flag: True}, sigma_min=0.1, sigma_max=9.0).table(10)
        sigmas = table.levels[:, 1] / table.levels[:, 0]
        assert (sigmas[0], sigmas[-2], sigmas[-1]) == pytest.approx((9.0, 0.1, 0.0))


def test_noise_is_that_of_the_thresholded_sample() -> None:
    config = {"predict_x0": False, "final_sigmas_type": "sigma_min"}
    assert UniPCMultistepScheduler(**SD, **config, thresholding=True).table(5).rows[0, 0, 1] != 0
    assert UniPCMultistepScheduler(**SD, **config).table(5).rows[0, 0, 1] == 0


UNIPC = UniPCMultistepScheduler(**SD)


@pytest.mark.parametrize(
    ("scheduler", "predictor", "message"),
    [
        (UNIPC, DDIMScheduler(), "must be a multistep sampler such as DPMSolverMultistepScheduler, got DDIMScheduler"),
        (UNIPC, DPMSolverMultistepInverseScheduler(), "got DPMSolverMultistepInverseScheduler"),
        (UNIPC, DPMSolverMultistepScheduler(thresholding=True), "set thresholding=False"),
        (
            UNIPC,
            DPMSolverMultistepScheduler(prediction_type="v_prediction"),
            "has prediction_type 'v_prediction', the corrector 'epsilon'; they must agree",
        ),
        (
            UNIPC.replace(solver_order=3),
            DPMSolverMultistepScheduler(solver_order=3),
            "remembers 2 tensors, beside solver_order=3 there is room for 1; lower one of the orders",
        ),
    ],
)
def test_impossible_predictors_are_refused(scheduler: Scheduler, predictor: Scheduler, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheduler.table(10, solver_p=predictor)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"solver_p": DDIMScheduler()}, r"solver_p must be None, got DDIMScheduler.*plan\(\.\.\., solver_p=\)"),
        ({"solver_order": 4}, r"solver_order must be one of \[1, 2, 3\], got 4"),
        ({"predict_x0": False}, "cannot step to a clean sample; set final_sigmas_type='sigma_min'"),
    ],
)
def test_impossible_settings(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniPCMultistepScheduler(**config)
