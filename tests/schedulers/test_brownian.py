"""The Brownian path behind a key, and the samplers that follow it."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax import schedulers
from diffuse_jax.schedulers import brownian
from diffuse_jax.schedulers import sigmas as sg
from tests.schedulers.samplers import NAMES, make

FINEST = 2.0**-brownian.DEPTH
TIMES = np.array([0.0, 0.001, 0.3, 0.3004, 0.5, 0.71, 1.0], np.float32)
MANY = (40000,)


@pytest.fixture(scope="module")
def path() -> np.ndarray:
    """Values at ``TIMES`` of many paths, ``[time, path]``."""
    at = jax.jit(lambda tick: brownian.position(jax.random.key(3), tick, MANY))
    return np.stack([at(brownian.ticks(jnp.float32(t))) for t in TIMES])


def test_increments_are_gaussian_with_the_variance_of_the_time_between(path: np.ndarray) -> None:
    np.testing.assert_array_equal(path[0], 0)
    steps = np.diff(path, axis=0) / np.sqrt(np.diff(TIMES))[:, None]
    np.testing.assert_allclose(steps.mean(1), 0, atol=4 / np.sqrt(MANY[0]))
    np.testing.assert_allclose(steps.std(1), 1, atol=4 / np.sqrt(2 * MANY[0]))
    for level, share in {0.5: 0.3829, 1.0: 0.6827, 2.0: 0.9545}.items():
        np.testing.assert_allclose((np.abs(steps) < level).mean(1), share, atol=0.01)


def test_disjoint_increments_are_independent(path: np.ndarray) -> None:
    correlation = np.corrcoef(np.diff(path, axis=0))
    np.testing.assert_allclose(correlation, np.eye(len(correlation)), atol=4 / np.sqrt(MANY[0]))


def test_increments_add_up() -> None:
    key = jax.random.key(5)
    a, b, c = (brownian.ticks(jnp.float32(t)) for t in (0.2, 0.20001, 0.6))

    def change(start: Any, end: Any) -> Any:
        return brownian.increment(key, start, end, (50,)) * np.sqrt((end - start) * FINEST)

    np.testing.assert_allclose(change(a, c), change(a, b) + change(b, c), atol=1e-6)
    np.testing.assert_allclose(np.std(change(a, b)), np.sqrt((b - a) * FINEST), rtol=0.3)


def test_every_key_has_its_own_path() -> None:
    tick = brownian.ticks(jnp.float32(0.4))
    first, second = (np.asarray(brownian.position(jax.random.key(k), tick, (5000,))) for k in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06


def test_time_on_the_path_has_room_for_all_levels() -> None:
    for sigmas in (np.geomspace(5e4, 2e-3, 2000), np.linspace(15, 0.03, 2000)):
        ends = np.array([sg.path_interval(a, b) for a, b in itertools.pairwise(sigmas)])
        ticks = np.asarray(brownian.ticks(jnp.asarray(ends, jnp.float32)))
        assert np.all(np.diff(ticks, axis=1) > 50)
        np.testing.assert_array_equal(ticks[1:, 0], ticks[:-1, 1])


STD = 0.6


@jax.jit
def sample(plan: Any, start: jax.Array, keys: jax.Array) -> jax.Array:
    """Run with the best network for data N(0, STD^2)."""

    def body(i: jax.Array, state: Any) -> Any:
        alpha, sigma = plan.levels[i]
        x0 = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * state.sample
        output = (x0 - plan.to_x0[i, 0] * state.sample) / plan.to_x0[i, 1]
        return plan.step(state, i, output, keys)

    state = plan.resume(jnp.hypot(plan.levels[0, 0] * STD, plan.levels[0, 1]) * start)
    return jax.lax.fori_loop(0, plan.num_evaluations, body, state).sample


ON_A_PATH = [name for name in NAMES if make(name).table(5).interval.any()]
SHAPE = (4, 200)


@pytest.mark.parametrize("name", ON_A_PATH)
def test_more_steps_give_the_same_image_more_exactly(name: str) -> None:
    scheduler = getattr(schedulers, name)()
    start, keys = jax.random.normal(jax.random.key(0), SHAPE), jax.random.split(jax.random.key(1), SHAPE[0])
    best = sample(scheduler.plan(400), start, keys)
    # The last step returns the best guess, which varies less than the data.
    assert np.std(best) == pytest.approx(STD**2 / np.hypot(STD, scheduler.table(400).levels[-2, 1]), rel=0.1)
    errors = [np.abs(sample(scheduler.plan(n), start, keys) - best).mean() for n in (20, 40, 80, 160)]
    assert all(fine < 0.75 * coarse for coarse, fine in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.1 * STD
    elsewhere = sample(scheduler.plan(80), start, keys[::-1])
    assert np.abs(elsewhere - best).mean() > 0.5 * STD


@pytest.mark.parametrize("name", ON_A_PATH)
def test_every_image_has_its_own_path(name: str) -> None:
    plan = getattr(schedulers, name)().plan(8)
    start, keys = jax.random.normal(jax.random.key(0), SHAPE), jax.random.split(jax.random.key(1), SHAPE[0])
    together = sample(plan, start, keys)
    np.testing.assert_array_equal(sample(plan, start[2:3], keys[2:3])[0], together[2])
    one_key = sample(plan, jnp.broadcast_to(start[:1], SHAPE), keys[0])
    assert np.abs(one_key[0] - one_key[1]).mean() > 0.1


def test_images_at_different_steps_of_a_run() -> None:
    plan = schedulers.DPMSolverSDEScheduler().plan(6)
    start, keys = jax.random.normal(jax.random.key(0), SHAPE), jax.random.split(jax.random.key(1), SHAPE[0])
    step = jax.jit(lambda x, i, keys: plan.step(plan.resume(x), i, x, keys).sample)
    together = step(start, jnp.array([0, 1, 7, 10]), keys)
    for b, i in enumerate([0, 1, 7, 10]):
        alone = step(start[b : b + 1], i, keys[b : b + 1])
        np.testing.assert_allclose(together[b], alone[0], rtol=1e-5, atol=1e-5)


def test_given_noise_is_used_as_it_is() -> None:
    scheduler = schedulers.DPMSolverSDEScheduler()
    plan, table = scheduler.plan(4), scheduler.table(4)
    x, noise = np.ones((1, 3), np.float32), np.full((1, 3), 0.5, np.float32)
    state = plan.step(plan.resume(x), 0, x, noise=noise)
    run = table.run(lambda *_: x.astype(np.float64), x.astype(np.float64), [noise.astype(np.float64)] * 7)
    np.testing.assert_allclose(state.sample, run[1], rtol=1e-5)


def test_a_seed_in_the_configuration_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        schedulers.DPMSolverSDEScheduler(noise_sampler_seed=3).table(4)
    assert "noise_sampler_seed=3 is not used: the key chooses the noise" in caplog.text
