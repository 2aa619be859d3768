"""DDIM inversion: where it goes, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from diffuse_jax.schedulers import DDIMInverseScheduler, DDIMScheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_levels_are_those_of_ddim_upwards(spacing: str) -> None:
    up = DDIMInverseScheduler(**SD, timestep_spacing=spacing).table(17)
    down = DDIMScheduler(**SD, timestep_spacing=spacing).table(17)
    np.testing.assert_array_equal(up.timesteps, down.timesteps[::-1])
    np.testing.assert_allclose(up.levels[-1], down.levels[0])
    end = DDIMScheduler(**SD, timestep_spacing=spacing).grid(17, timesteps=None, sigmas=None).target[-1]
    np.testing.assert_array_equal(up.levels[0], end)


def test_inversion_and_sampling_agree_as_steps_become_short() -> None:
    image = np.random.default_rng(0).uniform(-1, 1, (1, 6))
    model = lambda x, t: np.tanh(x) * (0.5 + t / 2000)

    def error(n: int) -> float:
        noise = DDIMInverseScheduler(**SD).table(n).run(model, image)[-1]
        return float(np.abs(DDIMScheduler(**SD).table(n).run(model, noise)[-1] - image).max())

    # The start (the image is put at timestep 0, DDIM ends at alpha 1) does not depend on the number of steps.
    assert error(500) < 0.3 * error(50)
    assert error(500) < 0.02


def test_explicit_timesteps_ascend() -> None:
    table = DDIMInverseScheduler(**SD).table(timesteps=[0, 300, 900])
    assert table.timesteps.tolist() == [0, 300, 900]
    levels = DDIMScheduler(**SD).train_levels()
    np.testing.assert_allclose(table.levels, [(1.0, 0.0), *levels[[0, 300, 900]]])
    with pytest.raises(ValueError, match="timesteps must ascend"):
        DDIMInverseScheduler().table(timesteps=[900, 300])


def test_strength_stops_early() -> None:
    whole, part = DDIMInverseScheduler(**SD).table(10), DDIMInverseScheduler(**SD).table(10, strength=0.4)
    np.testing.assert_array_equal(part.timesteps, whole.timesteps[:4])
    np.testing.assert_allclose(part.levels[-1], whole.levels[4])


def test_predicted_samples_carry_no_information_at_a_clean_image() -> None:
    with pytest.raises(ValueError, match="set set_alpha_to_one=False, which treats the image as a sample"):
        DDIMInverseScheduler(prediction_type="sample").table(5)
    table = DDIMInverseScheduler(prediction_type="sample", set_alpha_to_one=False).table(5)
    assert np.isfinite(table.rows).all()
