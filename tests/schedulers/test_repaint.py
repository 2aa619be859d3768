"""RePaint: which steps it evaluates, where jumps lead, how the known part is put in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.schedulers import DDIMScheduler, RePaintScheduler


def test_the_walk() -> None:
    table = RePaintScheduler(num_train_timesteps=40).table(8, jump_length=3, jump_n_sample=2)
    # From steps 3 and 0 (each third one that has a jump's length above it) three steps back, once.
    assert (table.timesteps / 5).tolist() == [7, 6, 5, 4, 3, 5, 4, 3, 2, 1, 0, 2, 1, 0]
    often = RePaintScheduler().table(50)
    assert len(often) == 50 + 9 * 10 * 4
    plain = RePaintScheduler(clip_sample=False).table(10, jump_n_sample=1)
    np.testing.assert_allclose(plain.rows, DDIMScheduler(clip_sample=False).table(10).rows, atol=1e-14)


def test_jumps_end_at_the_level_that_the_network_gets() -> None:
    scheduler = RePaintScheduler(eta=0.6)
    table = scheduler.table(20, jump_length=4, jump_n_sample=3)
    np.testing.assert_allclose(table.levels[:-1], scheduler.train_levels()[table.timesteps.astype(int)])
    np.testing.assert_array_equal(table.levels[-1], (1.0, 0.0))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_known_variances(eta: float) -> None:
    """With the right answer for data that is 0 (the noise is x / sigma), every row keeps the spread of its level."""
    jumps = {"jump_length": 2, "jump_n_sample": 4}
    table = RePaintScheduler(eta=eta, clip_sample=False).table(12, **jumps, as_published=True)
    np.testing.assert_allclose(table.known, table.levels, atol=1e-12)
    other = RePaintScheduler(eta=eta, clip_sample=False).table(12, **jumps)
    jumped = np.append(False, np.diff(other.timesteps) > 0)
    assert np.all(other.known[:-1, 1][jumped] > other.levels[:-1, 1][jumped]), "diffusers' jumps end a little higher"
    for row, (_, sigma), (_, after) in zip(table.rows, table.levels, table.levels[1:], strict=False):
        mean = row[0, 0] * sigma + row[0, 2]  # of x = sigma z the output is z
        assert np.hypot(mean, row[0, -1]) == pytest.approx(after, abs=1e-9)


def test_blending() -> None:
    plan = RePaintScheduler().plan(12, jump_length=3, jump_n_sample=2)
    shape = (2, 4, 4, 3)
    x0, noise, sample = (jax.random.normal(jax.random.key(k), shape) for k in range(3))
    known = jnp.zeros((4, 4, 1)).at[:2].set(1.0)
    x0 = x0.at[:, 2:].set(jnp.nan)  # unknown
    for i in (0, 5, int(plan.num_evaluations) - 1):
        state = plan.blend(plan.resume(sample), i, x0, noise, known)
        np.testing.assert_array_equal(state.sample[:, 2:], sample[:, 2:])
        np.testing.assert_array_equal(state.sample[:, :2], plan.noised(x0, noise, i + 1)[:, :2])
    np.testing.assert_array_equal(state.sample[:, :2], x0[:, :2])
    soft = plan.blend(plan.resume(sample), 0, noise, noise, jnp.full((1,), 0.25)).sample
    np.testing.assert_allclose(soft, 0.25 * plan.noised(noise, noise, 1) + 0.75 * sample, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jump_length": 0}, "jump_length must be at least 1, got 0"),
        ({"jump_n_sample": 0}, "jump_n_sample must be at least 1, got 0"),
        ({"jump_n_sample": 10**7}, "make 400000010 evaluations of 50 steps, more than 100000; use a smaller"),
        ({"strength": 0.5}, "goes back to more noise between its steps and is run as a whole, without strength="),
        ({"denoising_end": 0.5}, "run as a whole, without strength=, denoising_start= and denoising_end="),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RePaintScheduler().table(50, **options)
    with pytest.raises(ValueError, match="jumps over evenly spaced timesteps; give num_inference_steps"):
        RePaintScheduler().table(timesteps=[9, 5])
