"""TCD: what ``eta`` means, the choice of timesteps, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffuse_jax.schedulers import DDIMScheduler, LCMScheduler, TCDScheduler
from diffuse_jax.schedulers.table import Evaluation

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_without_noise_it_is_ddim_to_timestep_zero() -> None:
    table = TCDScheduler().table(5, eta=0.0)
    ddim = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False).table(timesteps=table.timesteps)
    np.testing.assert_allclose(table.rows, ddim.rows, atol=1e-13)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_noise_makes_up_for_the_jump(eta: float) -> None:
    """With the true clean sample and noise, the next sample is at the level of the next timestep."""
    table = TCDScheduler().table(4, eta=eta)
    levels = TCDScheduler().train_levels()
    x0, eps = np.zeros(table.rows.shape[-1]), np.zeros(table.rows.shape[-1])
    for i, t in enumerate([*table.timesteps[1:], 0]):
        # x = alpha * x0 + sigma * eps, and the network says eps.
        x0[0], eps[0], eps[2] = table.levels[i, 0], table.levels[i, 1], 1.0
        row = table.rows[i, 0]
        alpha, sigma = levels[int(t)]
        assert row @ x0 == pytest.approx(alpha)
        assert np.hypot(row @ eps, row[-1]) == pytest.approx(sigma)
    assert (table.rows[:-1, 0, -1] > 0).all() and table.rows[-1, 0, -1] == 0


def test_timesteps() -> None:
    for n in (1, 3, 4, 8):
        for strength in (1.0, 0.5):
            lcm = LCMScheduler().table(n, grid_strength=strength).timesteps
            np.testing.assert_array_equal(TCDScheduler().table(n, grid_strength=strength).timesteps, lcm)
    assert TCDScheduler().table(4, original_inference_steps=70).timesteps.tolist() == [999, 749, 499, 249]
    half = TCDScheduler().table(50, original_inference_steps=70, grid_strength=0.5)
    assert half.timesteps[:2].tolist() == [499, 489]


def test_clean_samples_are_clipped_if_asked_for() -> None:
    table = TCDScheduler(clip_sample=True, clip_sample_range=0.5).table(4)
    assert table.clip == 0.5
    assert isinstance(TCDScheduler(thresholding=True).evaluation(500, (0.6, 0.8)), Evaluation)
    assert table.rows[0, 0, 1] != 0, "the clipped sample is used"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"num_inference_steps": 4, "eta": 1.5}, r"eta must lie between 0 \(no noise\) and 1, got 1.5"),
        ({"num_inference_steps": 4, "eta": -0.1}, "got -0.1"),
        ({"num_inference_steps": 4, "strided": True}, "no option strided; its options: .*eta"),
        ({"num_inference_steps": 51}, "fewer than the 51 steps"),
        ({"num_inference_steps": 71, "original_inference_steps": 70}, "fewer than the 71 steps"),
    ],
)
def test_impossible_requests(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TCDScheduler().table(**request_)
