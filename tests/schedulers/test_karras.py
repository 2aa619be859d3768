"""Algorithm 2 of Karras et al. 2022: published figures, the noise before each step, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffuse_jax.schedulers import KarrasEDMScheduler, KarrasVeScheduler
from diffuse_jax.schedulers.table import Table

STD = 0.5
"""Standard deviation of the data."""


def best_network(table: Table) -> Any:
    rows = iter(zip(table.levels, table.to_x0, table.input_scale, strict=False))

    def model(x: np.ndarray, t: float) -> np.ndarray:
        (_, sigma), (of_sample, of_output), scale = next(rows)
        return (STD**2 / (STD**2 + sigma**2) * x / scale - of_sample * x / scale) / of_output

    return model


def test_published_levels() -> None:
    """Ten steps of the default configuration, figures of the project that described the class."""
    levels = KarrasEDMScheduler().table(10).levels[:, 1]
    published = [80, 42.4152, 21.1087, 9.7232, 4.06612, 1.50174, 0.46998, 0.11664, 0.02044, 0.002]
    np.testing.assert_allclose(levels[[0, *range(1, 19, 2)]], published, rtol=3e-4)
    assert len(levels) == 20
    assert levels[-1] == 0


def test_published_run() -> None:
    """The same with a network that is x * t / (t + 1)."""
    table = KarrasEDMScheduler(num_train_timesteps=256).table(10)
    end = table.run(lambda x, t: x * t / (t + 1), 80 * np.arange(768)[None] / 768)[-1]
    assert np.abs(end).sum() == pytest.approx(84.204926, abs=1e-4)
    assert np.abs(end).mean() == pytest.approx(0.1096, abs=1e-4)


@pytest.mark.parametrize("scheduler", [KarrasEDMScheduler(num_train_timesteps=500), KarrasVeScheduler(s_churn=0.0)])
def test_second_order(scheduler: Any) -> None:
    """Between two levels; the last step to 0 is left out of the count."""
    errors = []
    for n in (60, 120):
        table = scheduler.table(sigmas=list(np.geomspace(8.0, 0.05, n + 1)))
        end = table.run(best_network(table), np.array([[np.hypot(STD, 8.0)]]))[-1].item()
        errors.append(abs(end / np.hypot(STD, 0.05) - 1))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize(
    "scheduler", [KarrasEDMScheduler(num_train_timesteps=500, s_churn=40.0), KarrasVeScheduler(s_noise=1.0)]
)
def test_churn_keeps_the_variance(scheduler: Any) -> None:
    table = scheduler.table(200)
    n = len(table)
    start = np.zeros((n + 1, 1))
    start[-1] = np.hypot(STD, table.levels[0, 1])
    response = table.run(best_network(table), start, list(np.eye(n, n + 1)[:, :, None]))[-1]
    assert (response[:-1] ** 2).sum() > 0.5 * STD**2, "most of the result is fresh noise"
    assert np.sqrt((response**2).sum()) == pytest.approx(STD, rel=0.03)


def test_noise_before_a_step_belongs_to_the_step_before() -> None:
    scheduler = KarrasEDMScheduler(s_churn=8.0, s_tmin=0.1, s_tmax=50.0, s_noise=1.1)
    table, sigmas = scheduler.table(20), KarrasEDMScheduler().table(20).levels[[0, *range(1, 39, 2)], 1]
    drawn, raised = table.rows[:, 0, -1], np.array([*table.levels[2:-1:2, 1]])
    np.testing.assert_array_equal(drawn[::2], 0)
    inside = (sigmas[1:] >= 0.1) & (sigmas[1:] <= 50)
    np.testing.assert_allclose(raised / sigmas[1:], np.where(inside, 1.4, 1.0))
    np.testing.assert_allclose(drawn[1::2], 1.1 * np.sqrt(raised**2 - sigmas[1:] ** 2), atol=1e-9)
    assert table.init_scale == sigmas[0], "the first level is above s_tmax"
    low = KarrasEDMScheduler(s_churn=8.0, s_noise=1.1).table(20)
    assert low.init_scale == pytest.approx(80 * np.sqrt(1 + 1.1**2 * (1.4**2 - 1)))


def test_the_time_that_the_network_gets() -> None:
    sigmas = [5.0, 1.0, 0.0]
    inputs = {"edm": np.log(5) / 4, "cm_edm": 250 * np.log(5), "none": 5.0, None: 5.0}
    for kind, first in inputs.items():
        scheduler = KarrasEDMScheduler(precondition_type=kind)
        assert scheduler.table(sigmas=sigmas).timesteps[0] == pytest.approx(first)
        x0, noise = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)
        np.testing.assert_allclose(scheduler.add_noise(x0, noise, np.float32(first)), 5.0, rtol=1e-5)
    np.testing.assert_allclose(KarrasVeScheduler(s_churn=0.0).table(sigmas=sigmas).timesteps, [5, 1, 1])


def test_other_outputs_are_read_first_and_preconditioned_then(rng: np.random.Generator) -> None:
    """D = c_skip * x + c_out * (clean sample that the output means, clipped if asked)."""
    x, out, sigma = *rng.standard_normal((2, 1, 50)), 3.0
    skip, scale = 0.25 / (9 + 0.25), 3 * 0.5 / np.sqrt(9 + 0.25)
    means = {
        "sample": out,
        "epsilon": x - sigma * out,
        "v_prediction": x / 10 - 3 / np.sqrt(10) * out,
    }
    for kind, clean in means.items():
        for clip in (False, True):
            scheduler = KarrasEDMScheduler(prediction_type=kind, clip_sample=clip, clip_sample_range=0.4)
            end = scheduler.table(sigmas=[sigma, 0.0]).run(lambda *_: out, x)[-1]
            want = skip * x + scale * (np.clip(clean, -0.4, 0.4) if clip else clean)
            np.testing.assert_allclose(end, want, atol=1e-12)


def test_explicit_timesteps_are_places_in_the_training_list() -> None:
    every = KarrasEDMScheduler().table(40).levels[[0, *range(1, 79, 2)], 1]
    some = KarrasEDMScheduler().table(timesteps=[39, 20, 0]).levels[[0, 1, 3], 1]
    np.testing.assert_allclose(some, every[[0, 20, 39]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KarrasEDMScheduler().table(41), r"from 1 to 40 \(num_train_timesteps\), got 41"),
        (lambda: KarrasEDMScheduler().table(timesteps=[40, 0]), "between 0 and 39, got 40"),
        (lambda: KarrasEDMScheduler().table(timesteps=[0, 10]), "must descend"),
        (lambda: KarrasEDMScheduler(precondition_type="cm"), "precondition_type must be one of"),
        (lambda: KarrasEDMScheduler(sigma_min=90.0), "got 80 and 90"),
        (lambda: KarrasVeScheduler(sigma_max=0.01), "got 0.01 and 0.02"),
        (lambda: KarrasVeScheduler(num_train_timesteps=10), "has no setting num_train_timesteps"),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
