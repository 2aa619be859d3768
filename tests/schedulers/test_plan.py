"""The device side: one compilation, keys and noise, padding, agreement with the NumPy table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from diffuse_jax import schedulers
from diffuse_jax.schedulers.continuous import ContinuousScheduler
from diffuse_jax.schedulers.plan import CAPACITY, Plan
from diffuse_jax.schedulers.table import Evaluation, Table
from tests.schedulers.samplers import LATE, NAMES, stochastic

STOCHASTIC = [name for name in NAMES if stochastic(name)]
SHAPE = (3, 4, 4, 2)
TRACES: list[int] = []


def network(x: Any, t: Any, lib: Any = jnp) -> Any:
    """Bounded, because a sampler that takes it for a score multiplies it by the square of sigma."""
    return 3 * lib.tanh(0.3 * x) + 0.2 * lib.sin(1.5 * x + 0.002 * t)


@jax.jit
def sample(plan: Plan, start: jax.Array, key: jax.Array) -> jax.Array:
    TRACES.append(1)

    def body(i: jax.Array, state: Any) -> Any:
        return plan.step(state, i, network(plan.model_input(state, i), plan.timestep(i)), key)

    return jax.lax.fori_loop(0, plan.num_evaluations, body, plan.init(start)).sample


@jax.jit
def one_step(plan: Plan, state: Any, i: Any, output: jax.Array, key: jax.Array) -> Any:
    return plan.step(state, i, output, key)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_step_by_step_without_jit_compiles_once(
    name: str, start: np.ndarray, keys: jax.Array, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever comes after the first step finds what that compiled; the values are the program's."""
    plan = build(name).plan(8)
    for key in (jax.random.key(3), keys):
        state = plan.init(start)
        for i in range(int(plan.num_evaluations)):
            output = network(plan.model_input(state, i), plan.timestep(i))
            wanted = one_step(plan, state, i, output, key).sample
            caplog.clear()
            with jax.log_compiles(i > 0):
                state = plan.step(state, i, output, key)
            assert not [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()]
            np.testing.assert_allclose(state.sample, wanted, rtol=1e-5, atol=1e-6 * float(np.abs(wanted).max()))


def build(name: str, **config: Any) -> schedulers.Scheduler:
    return getattr(schedulers, name)(**config)


@pytest.fixture
def start(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(SHAPE).astype(np.float32)


@pytest.fixture
def keys() -> jax.Array:
    return jax.random.split(jax.random.key(7), SHAPE[0])


def test_one_trace_for_every_sampler_and_step_count(start: np.ndarray, keys: jax.Array) -> None:
    sample(build("DDIMScheduler").plan(3), start, keys)
    before = len(TRACES)
    for name in NAMES:
        for n in (4, 9, 40):
            assert np.isfinite(sample(build(name).plan(n), start, keys)).all()
    plans = [
        build("DDIMScheduler", prediction_type="v_prediction").plan(10, eta=0.4, strength=0.5),
        build("EulerDiscreteScheduler").plan(sigmas=[9.0, 3.0, 1.0, 0.0]),
        build("PNDMScheduler", skip_prk_steps=True).plan(12, denoising_end=0.5),
        build("DDPMScheduler").plan(1000),
    ]
    for plan in plans:
        sample(plan, start, keys)
    assert len(TRACES) == before


@pytest.mark.parametrize("name", [n for n in NAMES if n not in STOCHASTIC])
def test_compiled_loop_is_the_table(name: str, start: np.ndarray, keys: jax.Array) -> None:
    scheduler = build(name)
    table = scheduler.table(13)
    model = lambda x, t: network(x, t, np)
    want = table.run(model, table.init_scale * start.astype(np.float64))
    got = sample(scheduler.plan(13), start, keys)
    assert np.abs(got - want[-1]).max() < 1e-5 * np.abs(want).max()


def test_scan_and_a_python_loop_agree_with_the_compiled_loop(start: np.ndarray, keys: jax.Array) -> None:
    plan = build("EulerAncestralDiscreteScheduler").plan(3)
    want = sample(plan, start, keys)
    state = plan.init(start)
    for i in range(3):
        state = plan.step(state, i, network(plan.model_input(state, i), plan.timestep(i)), keys)
    np.testing.assert_allclose(state.sample, want, atol=1e-4)

    @jax.jit
    def scanned(plan: Plan, start: jax.Array, keys: jax.Array) -> jax.Array:
        def body(state: Any, i: jax.Array) -> Any:
            return plan.step(state, i, network(plan.model_input(state, i), plan.timestep(i)), keys), None

        return jax.lax.scan(body, plan.init(start), jnp.arange(3))[0].sample

    np.testing.assert_allclose(scanned(plan, start, keys), want, atol=1e-4)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_every_sample_owns_its_noise(name: str, start: np.ndarray, keys: jax.Array) -> None:
    plan = build(name).plan(20)
    together = sample(plan, start, keys)
    alone = sample(plan, start[1:2], keys[1:2])
    np.testing.assert_array_equal(alone[0], together[1])
    other = sample(plan, start, keys[::-1])
    assert np.abs(other - together)[0].max() > 1e-3
    one_key = sample(plan, np.broadcast_to(start[:1], SHAPE), keys[0])
    assert np.abs(one_key[0] - one_key[1]).max() > 1e-3, "samples of one key must differ"


def test_every_step_draws_new_noise(start: np.ndarray, keys: jax.Array) -> None:
    plan = build("EulerAncestralDiscreteScheduler").plan(5)
    zero = jnp.zeros_like(start)
    state = plan.init(start)

    def noise(i: int) -> np.ndarray:
        moved = plan.step(state, i, zero, keys).sample - plan.step(state, i, zero, noise=zero).sample
        return np.asarray(moved) / np.asarray(plan.rows)[i, 0, -1]

    a, b = noise(0), noise(1)
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.5
    assert a.std() == pytest.approx(1, abs=0.25)


def outside_branches(jaxpr: Any) -> Iterator[str]:
    """The primitives that are always computed, also those of functions that are inlined only when they are lowered."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if equation.primitive.name != "cond":
            for inner in jaxprs_in_params(equation.params):
                yield from outside_branches(inner)


def test_deterministic_samplers_ignore_the_key_and_skip_the_draw(start: np.ndarray, keys: jax.Array) -> None:
    plan = build("DDIMScheduler").plan(5)
    np.testing.assert_array_equal(sample(plan, start, keys), sample(plan, start, keys[::-1]))
    jaxpr = jax.make_jaxpr(lambda p, s, k: p.step(s, 0, s.sample, k))(plan, plan.init(start), keys)
    names = set(outside_branches(jaxpr.jaxpr))
    assert "cond" in names
    assert not {n for n in names if "random" in n or "threefry" in n}, "drawing must stay inside the branch"


@pytest.mark.parametrize("thresholding", [False, True])
def test_predicted_samples_are_limited(thresholding: bool, start: np.ndarray) -> None:
    scheduler = build("DDIMScheduler", thresholding=thresholding, sample_max_value=1.5, clip_sample_range=0.7)
    plan = scheduler.plan(5)
    x0 = plan.predict_x0(plan.init(3 * start), 2, start)
    limit = 1.0 if thresholding else 0.7
    assert np.abs(x0).max() == pytest.approx(limit)
    want = scheduler.table(5).correct(np.asarray(plan.to_x0)[2, 0] * 3 * start + np.asarray(plan.to_x0)[2, 1] * start)
    np.testing.assert_allclose(x0, want, atol=1e-5)


def test_image_to_image_starts_at_the_level_of_its_first_step(start: np.ndarray) -> None:
    for name in [*LATE, "LCMScheduler"]:
        scheduler = build(name)
        plan = scheduler.plan(10, strength=0.5)
        x0 = jnp.ones(SHAPE)
        t = float(plan.timesteps[0])
        t = t if isinstance(scheduler, ContinuousScheduler) else round(t)
        noisy = scheduler.add_noise(x0, start, np.asarray(t))
        np.testing.assert_allclose(plan.init(start, x0).sample, noisy, rtol=0.01, atol=0.01)
        np.testing.assert_array_equal(plan.noised(x0, start, int(plan.num_evaluations)), x0)


def test_learned_variance_interpolates_between_the_bounds(start: np.ndarray) -> None:
    plan = build("DDPMScheduler", variance_type="learned_range", clip_sample=False).plan(10)
    noise, state = jnp.ones(SHAPE), plan.init(start)

    def moved(v: float) -> np.ndarray:
        out = jnp.concatenate([start, jnp.full(SHAPE, v)], -1)
        quiet = plan.step(state, 3, out, noise=jnp.zeros(SHAPE)).sample
        return np.asarray(plan.step(state, 3, out, noise=noise).sample - quiet)

    low, high = np.exp(0.5 * np.asarray(plan.log_variance)[3])
    np.testing.assert_allclose(moved(-1.0), low, rtol=1e-2)
    np.testing.assert_allclose(moved(1.0), high, rtol=1e-2)
    np.testing.assert_allclose(moved(0.0), np.sqrt(low * high), rtol=1e-2)


def test_a_variance_that_is_not_used_is_dropped(start: np.ndarray) -> None:
    plan = build("DPMSolverMultistepScheduler").plan(4)
    state = plan.init(start)
    out = jnp.concatenate([start, 100 + start], -1)
    np.testing.assert_array_equal(
        plan.step(state, 0, out, noise=start).sample, plan.step(state, 0, start, noise=start).sample
    )


def test_errors_of_step(start: np.ndarray, keys: jax.Array) -> None:
    plan = build("DDIMScheduler").plan(4)
    state = plan.init(start)
    with pytest.raises(ValueError, match=r"needs a key .* or noise="):
        plan.step(state, 0, start)
    with pytest.raises(ValueError, match=r"3 keys \(one per sample\), got shape \(2,\)"):
        plan.step(state, 0, start, keys[:2])
    with pytest.raises(ValueError, match=r"made by jax\.random\.key .* got an array of uint32"):
        plan.step(state, 0, start, jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match=r"made by jax\.random\.key .* got 7"):
        plan.step(state, 0, start, 7)
    with pytest.raises(ValueError, match=r"returned \(3, 4, 4, 1\) for a sample of \(3, 4, 4, 2\)"):
        plan.step(state, 0, start[..., :1], keys)
    learned = build("DDPMScheduler", variance_type="learned_range").plan(4)
    with pytest.raises(ValueError, match=r"expected \(3, 4, 4, 4\)"):
        learned.step(state, 0, start, keys)


def test_long_runs_get_more_room() -> None:
    scheduler = build("DDPMScheduler", num_train_timesteps=3000)
    assert build("DDPMScheduler").plan(1000).timesteps.shape == (CAPACITY,)
    assert scheduler.plan(3000).timesteps.shape == (4096,)


def test_a_custom_sampler_runs_without_registration(start: np.ndarray, keys: jax.Array) -> None:
    """Rows written by hand: one step of Euler from sigma 2 to 0."""
    e = Evaluation(500, (1.0, 2.0), "epsilon", corrected=False)
    plan = Plan.from_table(Table.build([e.row(e.x - 2.0 * e.output)], 2.0))
    want = 2 * start - 2 * network(2 * start / np.sqrt(5), 500, np)
    np.testing.assert_allclose(sample(plan, start, keys), want, atol=1e-5)


def test_tables_need_no_jax() -> None:
    code = (
        "import sys; from diffuse_jax.schedulers import DPMSolverMultistepScheduler as S; S().table(20);"
        " assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_samples_at_different_evaluations_in_one_call(name: str, start: np.ndarray, keys: jax.Array) -> None:
    """What parallel sampling needs: the same values and the same noise as one sample after the other."""
    plan = build(name).plan(9)
    memory = tuple(jax.random.normal(jax.random.key(k), SHAPE) for k in range(5))
    state, at = plan.init(start)._replace(memory=memory), np.array([0, 7, 3])
    x, t = plan.model_input(state, at), plan.timestep(at)
    output = network(x, t.reshape(-1, 1, 1, 1))
    together = jax.jit(Plan.step)(plan, state, at, output, keys)
    for b, i in enumerate(at.tolist()):
        own = jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], state)
        np.testing.assert_array_equal(plan.model_input(own, i), x[b : b + 1])
        np.testing.assert_array_equal(plan.timestep(i), t[b])
        alone = plan.step(own, i, output[b : b + 1], keys[b : b + 1])
        for mine, theirs in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(mine[0], theirs[b], atol=1e-5)
        np.testing.assert_allclose(
            plan.noised(start, output, at)[b], plan.noised(start[b], output[b], i), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            plan.predict_x0(state, at, output)[b], plan.predict_x0(own, i, output[b : b + 1])[0], atol=1e-5
        )
    with pytest.raises(ValueError, match="different evaluations need a key each, 3 keys, got one"):
        plan.step(state, at, output, keys[0])


def test_parallel_sampling_finds_the_sequential_run(start: np.ndarray) -> None:
    """Picard iteration (Shih et al. 2023, alg. 1): all steps at once, until nothing changes."""
    n, plan = 6, build("DDIMScheduler", clip_sample=False).plan(6, eta=0.5)
    first, key, every = start[:1], jax.random.key(3), jnp.arange(6)
    keys = jnp.broadcast_to(key[None], (n,))
    state = plan.init(first)
    for i in range(n):
        state = plan.step(state, i, network(plan.model_input(state, i), plan.timestep(i)), key[None])
    path = jnp.broadcast_to(plan.init(first).sample, (n + 1, *first.shape[1:]))
    for _ in range(n):
        here = plan.resume(path[:-1])
        output = network(plan.model_input(here, every), plan.timestep(every).reshape(-1, 1, 1, 1))
        moves = plan.step(here, every, output, keys).sample - path[:-1]
        path = path.at[1:].set(path[:1] + jnp.cumsum(moves, 0))
    np.testing.assert_allclose(path[-1:], state.sample, atol=1e-4)


def test_a_variance_in_the_second_half_is_taken_as_it_is(start: np.ndarray) -> None:
    plan = build("DDPMScheduler", variance_type="learned", clip_sample=False).plan(10)
    state, one = plan.init(start), jnp.ones(SHAPE)

    def moved(v: float) -> np.ndarray:
        out = jnp.concatenate([start, jnp.full(SHAPE, v)], -1)
        return np.asarray(plan.step(state, 3, out, noise=one).sample - plan.step(state, 3, out, noise=0 * one).sample)

    np.testing.assert_allclose(moved(0.04), 0.2, rtol=1e-4)
    np.testing.assert_array_equal(moved(-1.0), 0)
