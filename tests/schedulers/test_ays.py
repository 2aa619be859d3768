"""Align Your Steps: the schedules run on every sampler that takes timesteps or sigmas."""

from __future__ import annotations

import numpy as np
import pytest

from diffuse_jax import schedulers
from diffuse_jax.schedulers import AYS

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BY_TIMESTEP = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
BY_SIGMA = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)


def build(name: str) -> schedulers.Scheduler:
    return schedulers.Scheduler.from_config(SD | {"_class_name": name})


@pytest.mark.parametrize("schedule", ["StableDiffusionTimesteps", "StableDiffusionXLTimesteps"])
@pytest.mark.parametrize("name", BY_TIMESTEP)
def test_timesteps(name: str, schedule: str) -> None:
    table = build(name).table(timesteps=AYS[schedule])
    assert sorted(set(table.timesteps), reverse=True) == list(AYS[schedule])
    assert np.isfinite(table.rows).all()


@pytest.mark.parametrize("schedule", ["StableDiffusionSigmas", "StableDiffusionXLSigmas"])
@pytest.mark.parametrize("name", BY_SIGMA)
def test_sigmas(name: str, schedule: str) -> None:
    table = build(name).table(sigmas=AYS[schedule])
    sigmas = np.unique(table.levels[:, 1] / table.levels[:, 0])[::-1]
    np.testing.assert_allclose(sigmas, AYS[schedule], rtol=1e-12)
    assert np.isfinite(table.rows).all()


def test_the_schedules_of_a_model_mean_the_same_levels() -> None:
    """The published sigmas are about those of the published timesteps."""
    sigma = build("EulerDiscreteScheduler").sigma_table
    for model in ("StableDiffusion", "StableDiffusionXL"):
        timesteps, sigmas = AYS[f"{model}Timesteps"], AYS[f"{model}Sigmas"]
        np.testing.assert_allclose(sigma[list(timesteps)], sigmas[:-1], rtol=0.05)


def test_video_sigmas_run_on_a_continuous_schedule() -> None:
    scheduler = schedulers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    table = scheduler.table(sigmas=AYS["StableDiffusionVideoSigmas"])
    np.testing.assert_allclose(table.timesteps, 0.25 * np.log(AYS["StableDiffusionVideoSigmas"][:-1]))


def test_the_schedules_of_pytorch() -> None:
    theirs = pytest.importorskip("diffusers").schedulers.AysSchedules
    assert {name: list(values) for name, values in AYS.items()} == theirs
