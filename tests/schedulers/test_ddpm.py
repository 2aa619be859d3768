"""Ancestral sampling and its variants: posteriors, variances, times."""

from __future__ import annotations

import numpy as np
import pytest

from diffuse_jax.schedulers import DDPMScheduler, DDPMWuerstchenScheduler, UnCLIPScheduler
from diffuse_jax.schedulers.ddpm import posterior
from diffuse_jax.schedulers.table import Evaluation


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), UnCLIPScheduler(), DDPMWuerstchenScheduler(s=0.02, scaler=1.4)])
def test_the_posterior_keeps_the_marginals(scheduler: DDPMScheduler) -> None:
    """A noisy sample of x0 goes to a noisy sample of x0 at the next level: x = alpha x0 + sigma eps."""
    grid = scheduler.grid(7, timesteps=None, sigmas=None)
    for t, (alpha, sigma), target in zip(grid.timesteps[:-1], grid.source, grid.target, strict=False):
        e = Evaluation(t, (alpha, sigma), "sample")
        mean, variance, beta = posterior(e, target)
        of_x0, of_x = mean @ e.x0, mean @ e.x
        assert of_x0 + of_x * alpha == pytest.approx(target[0])
        assert (of_x * sigma) ** 2 + variance == pytest.approx(target[1] ** 2)
        assert 0 <= variance <= beta < 1


def test_the_variances_that_names_say() -> None:
    def std(kind: str) -> np.ndarray:
        return DDPMScheduler(variance_type=kind).table(5).rows[:, 0, -1]

    np.testing.assert_array_equal(std("fixed_small_log"), std("fixed_small"))
    np.testing.assert_array_equal(std("fixed_large_log"), std("fixed_large"))
    assert np.all(std("fixed_large")[:-1] > std("fixed_small")[:-1])
    assert std("fixed_large")[-1] == 0
    table = DDPMScheduler(variance_type="learned_range").table(5)
    np.testing.assert_allclose(
        np.exp(table.log_variance[:-1] / 2).T, [std("fixed_small")[:-1], std("fixed_large")[:-1]]
    )


def test_unclip_runs_from_the_last_to_the_first_timestep() -> None:
    assert UnCLIPScheduler().table(4).timesteps.tolist() == [999, 666, 333, 0]
    assert UnCLIPScheduler().table(1).timesteps.tolist() == [999]
    with pytest.raises(ValueError, match=r"prediction_type must be one of \['epsilon', 'sample'\]"):
        UnCLIPScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="UnCLIPScheduler has no setting thresholding; it has num_train_timesteps"):
        UnCLIPScheduler(thresholding=True)


def test_wuerstchen_times() -> None:
    scheduler = DDPMWuerstchenScheduler()
    np.testing.assert_allclose(scheduler.table(4).timesteps, [1, 0.75, 0.5, 0.25])
    with_zero, without = scheduler.table(timesteps=[1.0, 0.4, 0.0]), scheduler.table(timesteps=[1.0, 0.4])
    np.testing.assert_array_equal(with_zero.rows, without.rows)
    np.testing.assert_array_equal(scheduler.table(timesteps=[0.3]).timesteps, [0.3])
    assert len(scheduler.table(4, strength=0.5)) == 2
    assert np.square(scheduler.level(np.array([1.0, 0.0]))[0]).tolist() == pytest.approx([0.0001, 0.9999])
    noisier, cleaner = DDPMWuerstchenScheduler(scaler=2.0), DDPMWuerstchenScheduler(scaler=0.5)
    # 0.19^0.5 and 1 - 0.81^2 bend both of these times to 0.4359 and 0.3439 of the plain schedule.
    np.testing.assert_allclose(noisier.level(0.19), scheduler.level(1 - 0.81**2))
    np.testing.assert_allclose(cleaner.level(0.19), scheduler.level(0.19**0.5))
    with pytest.raises(ValueError, match="timesteps must lie between 0 and 1"):
        scheduler.table(timesteps=[999, 0])
    with pytest.raises(ValueError, match="give timesteps= from 1 to 0 instead of sigmas="):
        scheduler.table(sigmas=[1.0, 0.0])
