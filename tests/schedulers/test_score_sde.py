"""Score SDEs: where they start and end, exact answers for Gaussian data, the Langevin corrector."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.schedulers import ScoreSdeVeScheduler, ScoreSdeVpScheduler

STD = 0.6


def test_ve_levels() -> None:
    table = ScoreSdeVeScheduler().table(5)
    np.testing.assert_allclose(table.levels[:-1, 1], np.geomspace(1348, 0.01, 5))
    np.testing.assert_array_equal(table.levels[-1], (1.0, 0.0))
    np.testing.assert_allclose(table.timesteps, table.levels[:-1, 1], rtol=2e-4)
    np.testing.assert_array_equal(table.input_scale, 1)
    assert table.init_scale == pytest.approx(1348)
    assert table.rows[-1, 0, -1] == 0
    given = ScoreSdeVeScheduler().table(sigmas=[3.0, 1.0, 0.5])
    np.testing.assert_array_equal(given.timesteps, [3, 1])
    assert given.rows[-1, 0, -1] == pytest.approx(np.sqrt(0.75))
    with pytest.raises(ValueError, match="tells the network sigma; give sigmas= instead of timesteps="):
        ScoreSdeVeScheduler().table(timesteps=[3, 1])


def test_vp_levels() -> None:
    scheduler = ScoreSdeVpScheduler()
    table = scheduler.table(4)
    np.testing.assert_allclose(table.timesteps, np.linspace(1, 1e-3, 4))
    np.testing.assert_allclose((table.levels**2).sum(1), 1)
    # d log(alpha) / dt is -beta / 2.
    alpha = np.log(scheduler.level(np.array([0.4999, 0.5001]))[0])
    assert np.diff(alpha)[0] / 2e-4 == pytest.approx(-(0.1 + 0.5 * 19.9) / 2, rel=1e-6)
    with pytest.raises(ValueError, match="makes steps of equal length; give num_inference_steps"):
        scheduler.table(timesteps=[0.5])


def final_spread(table, of_output) -> float:
    """Everything is linear: the final spread of data N(0, STD^2) is the root of summed squared responses."""
    n = len(table)
    start = np.zeros((n + 1, 1))
    start[-1] = np.hypot(table.levels[0, 0] * STD, table.levels[0, 1])
    levels = iter(table.levels)

    def model(x: np.ndarray, t: float) -> np.ndarray:
        alpha, sigma = next(levels)
        return of_output(sigma) * x / ((alpha * STD) ** 2 + sigma**2)

    return float(np.sqrt((table.run(model, start, list(np.eye(n, n + 1)[:, :, None]))[-1] ** 2).sum()))


@pytest.mark.parametrize(
    ("scheduler", "of_output"), [(ScoreSdeVeScheduler(), lambda s: -1.0), (ScoreSdeVpScheduler(), lambda s: s)]
)
def test_gaussian_spread(scheduler, of_output) -> None:
    errors = [abs(final_spread(scheduler.table(n), of_output) / STD - 1) for n in (250, 1000)]
    assert errors[1] < errors[0] / 2
    assert errors[1] < 0.03


def test_the_corrector_keeps_the_right_spread_and_repairs_a_wrong_one() -> None:
    """Langevin dynamics at one level: stationary in p(x) = N(0, STD^2 + sigma^2), up to its step length."""
    scheduler = ScoreSdeVeScheduler(snr=0.1)
    plan = scheduler.plan(sigmas=[1.0, 0.0])
    spread, keys = np.hypot(STD, 1.0), jax.random.split(jax.random.key(0), 8)

    @jax.jit
    def corrected(x: jax.Array) -> jax.Array:
        def body(turn: jax.Array, state):
            return scheduler.correct(state, 0, -state.sample / spread**2, keys, turn=turn)

        return jax.lax.fori_loop(0, 400, body, plan.resume(x)).sample

    x = jax.random.normal(jax.random.key(1), (8, 16, 16, 4))
    for factor in (1.0, 0.2, 3.0):
        assert jnp.std(corrected(factor * spread * x)) == pytest.approx(spread, rel=0.03)


def test_a_correction_does_not_depend_on_the_rest_of_the_batch() -> None:
    scheduler = ScoreSdeVeScheduler()
    plan, keys = scheduler.plan(5), jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(jax.random.key(1), (3, 4, 4, 2))
    state, score = plan.resume(x), -x * jnp.array([1.0, 10.0, 0.1]).reshape(3, 1, 1, 1)
    together = scheduler.correct(state, 2, score, keys).sample
    alone = scheduler.correct(plan.resume(x[1:2]), 2, score[1:2], keys[1:2]).sample
    np.testing.assert_allclose(alone[0], together[1], rtol=1e-6)
    again = scheduler.correct(state, 2, score, keys, turn=1).sample
    assert np.abs(again - together).max() > 1e-3, "every turn draws anew"
    zero = jnp.zeros_like(x)
    drawn = together - x - (scheduler.correct(state, 2, score, noise=zero + 1e-30).sample - x)
    stepped = plan.step(state, 2, zero, keys).sample - plan.step(state, 2, zero, noise=zero).sample
    assert abs(np.corrcoef(np.ravel(drawn[0]), np.ravel(stepped[0]))[0, 1]) < 0.6, "nor is it the step's own noise"
    with pytest.raises(ValueError, match=r"returned \(3, 4, 4, 1\) for a sample of \(3, 4, 4, 2\)"):
        scheduler.correct(state, 2, score[..., :1], keys)
    with pytest.raises(ValueError, match=r"needs a key .* or noise="):
        scheduler.correct(state, 2, score)
