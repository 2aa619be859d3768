"""Consistency models: the boundary condition, the levels, the noise between steps, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffuse_jax.schedulers import CMStochasticIterativeScheduler


def test_the_sample_itself_at_the_lowest_level(rng: np.random.Generator) -> None:
    scheduler = CMStochasticIterativeScheduler(clip_denoised=False)
    x, out = rng.standard_normal((2, 1, 20))
    end = scheduler.table(sigmas=[scheduler.sigma_min, 0.001]).run(lambda *_: out, x)[-1]
    np.testing.assert_allclose(end, x, atol=1e-12)


def test_levels_of_the_training() -> None:
    every = CMStochasticIterativeScheduler().table(40).levels[:, 1]
    np.testing.assert_allclose(every[[0, -2]], [80, 0.002])
    np.testing.assert_allclose(CMStochasticIterativeScheduler().table(5).levels[:-1, 1], every[[0, 8, 16, 24, 32]])
    np.testing.assert_allclose(
        CMStochasticIterativeScheduler().table(timesteps=[39, 3, 0]).levels[:-1, 1], every[[0, 3, 39]]
    )
    assert CMStochasticIterativeScheduler(num_train_timesteps=1).table(1).levels[0, 1] == 80


def test_every_step_ends_at_the_next_level(rng: np.random.Generator) -> None:
    """With a network that always sees the same image, the variance around it is that of the level (but sigma_min)."""
    table = CMStochasticIterativeScheduler(clip_denoised=False).table(6)
    drawn = table.rows[:, 0, -1]
    np.testing.assert_allclose(np.hypot(drawn[:-1], 0.002), table.levels[1:-1, 1])
    assert drawn[-1] == 0
    louder = CMStochasticIterativeScheduler(s_noise=1.5).table(6)
    np.testing.assert_allclose(louder.rows[:, 0, -1], 1.5 * drawn)


def test_clean_samples_are_clipped() -> None:
    table = CMStochasticIterativeScheduler().table(1)
    assert table.clip == 1.0
    assert np.abs(table.run(lambda x, _: 100 * x, np.linspace(-80, 80, 9)[None])[-1]).max() == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CMStochasticIterativeScheduler().table(41), r"from 1 to 40 \(num_train_timesteps\), got 41"),
        (lambda: CMStochasticIterativeScheduler().table(timesteps=[40, 2]), "between 0 and 39, got 40"),
        (lambda: CMStochasticIterativeScheduler(sigma_min=90.0), "got 80 and 90"),
        (lambda: CMStochasticIterativeScheduler(prediction_type="sample"), "has no setting prediction_type"),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
