"""Trajectories with densities, and runs that are differentiated in their last evaluations only."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.pipelines import Method, Part, PlainStep, sample
from diffuse_jax.pipelines.method import Params, Rows, Step, advance, begin
from diffuse_jax.pipelines.parts import Branches, ClassifierFree, FromNoise, Raw
from diffuse_jax.pipelines.rollout import check_policy, random_evaluations, rollout, step_log_prob
from diffuse_jax.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    Scheduler,
)

N = 4
DDIM = DDIMScheduler(prediction_type="sample", clip_sample=False, steps_offset=1, set_alpha_to_one=False)


@dataclasses.dataclass(frozen=True)
class Curve(Part):
    """A denoiser that costs nothing to compile, conditioned on ``states [B,4]``."""

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        return jnp.tanh(x * params["w"].reshape(1, -1) + rows["states"] + step.t / 1000)


METHOD = Method(ClassifierFree(Curve()), FromNoise(), Raw(), (4,))
PARAMS = {"w": jnp.array([0.5, -1.0, 2.0, 0.1])}


def rows(count: int = 2) -> Rows:
    branches = np.random.default_rng(1).standard_normal((count, 2, 4)).astype(np.float32)
    each = lambda value: np.full(count, value, np.float32)
    return {
        "seed": np.arange(count, dtype=np.uint32), "index": np.zeros(count, np.uint32), "states": Branches(branches),
        "guidance_scale": each(3.0), "guidance_rescale": each(0.0),
    }  # fmt: skip


def test_a_rollout_is_a_run_with_its_densities() -> None:
    """Its results and samples are those of the run; densities of single steps are the same again."""
    plan = DDIM.plan(N, eta=1.0)
    found = jax.jit(functools.partial(rollout, METHOD, evaluations=N))(PARAMS, rows(), plan)
    np.testing.assert_allclose(found.results["images"], sample(METHOD, PARAMS, rows(), plan)["images"], rtol=1e-5)
    made, state = begin(METHOD, PARAMS, rows(), plan)
    again = jax.jit(functools.partial(step_log_prob, METHOD))
    for i in range(N):
        np.testing.assert_allclose(found.samples[:, i], state.sample, rtol=1e-5, atol=1e-6)
        state = advance(METHOD, PARAMS, made, plan, state, i)
        one = again(PARAMS, rows(), plan, i, found.samples[:, i], found.samples[:, i + 1])
        np.testing.assert_allclose(one, found.log_probs[:, i], rtol=1e-5)


def test_a_step_that_draws_nothing_counts_zero() -> None:
    plan = DDIM.replace(set_alpha_to_one=True).plan(N, eta=1.0)
    assert random_evaluations(plan).tolist() == [0, 1, 2]
    found = jax.jit(functools.partial(rollout, METHOD, evaluations=N))(PARAMS, rows(), plan)
    assert np.all(np.asarray(found.log_probs)[:, :3] != 0)
    assert np.all(np.asarray(found.log_probs)[:, 3] == 0)


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (DDIMScheduler(), {}, "draws no noise"),
        (EulerDiscreteScheduler(), {}, "draws no noise"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), {}, "earlier outputs"),
        (DPMSolverSDEScheduler(), {}, "Brownian|earlier outputs"),
        (DDIMScheduler(), {"eta": 0.1}, None),
        (DDPMScheduler(), {}, None),
        (EulerAncestralDiscreteScheduler(), {}, None),
    ],
)
def test_which_samplers_are_policies(scheduler: Scheduler, options: dict[str, Any], message: str | None) -> None:
    plan = scheduler.plan(4, **options)
    if message is None:
        return check_policy(METHOD, plan)
    with pytest.raises(ValueError, match=f"({message}).*use an ancestral sampler"):
        check_policy(METHOD, plan)


def test_a_method_that_does_more_than_a_step_is_no_policy() -> None:
    class Twice(PlainStep):
        """Another step."""

    with pytest.raises(ValueError, match="the density of Twice's steps is not known"):
        check_policy(dataclasses.replace(METHOD, advance=Twice()), DDIM.plan(4, eta=1.0))


@pytest.mark.parametrize("last", [0, 1, 2, N])
def test_only_the_last_evaluations_are_differentiated(last: int) -> None:
    """The gradient is that of a run from the sample before them, which is a constant."""
    plan, given = DDIM.plan(N, eta=1.0), rows()

    def loss(params: Params) -> Any:
        run = sample(METHOD, params, given, plan, evaluations=N, gradient_evaluations=last)
        return jnp.mean(run["images"] ** 2)

    def by_hand(params: Params) -> Any:
        made, state = begin(METHOD, params, given, plan)
        for i in range(N):
            state = jax.lax.stop_gradient(state) if i == N - last else state
            state = advance(METHOD, params, made, plan, state, i)
        return jnp.mean((state if last else jax.lax.stop_gradient(state)).sample ** 2)

    found, wanted = (jax.jit(jax.value_and_grad(f))(PARAMS) for f in (loss, by_hand))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(found[1]["w"], wanted[1]["w"], rtol=1e-5)
    assert bool(np.any(found[1]["w"])) == (last > 0)


@pytest.mark.parametrize("last", [1, 3])
def test_gradients_are_finite_differences_in_float64(last: int, rng: np.random.Generator) -> None:
    """Of the NumPy twin of the sampler, in which the parameters move in the last evaluations only."""
    table, plan, given = DDIM.table(N, eta=1.0), DDIM.plan(N, eta=1.0), rows()
    draws = {"noise": rng.standard_normal((2, 4)), "step_noise": rng.standard_normal((2, N, 4))}
    given |= {name: x.astype(np.float32) for name, x in draws.items()}
    states, held = np.float64(given["states"].values), np.float64(PARAMS["w"])

    def twin(w: np.ndarray) -> float:
        def guided(x: np.ndarray, t: float) -> np.ndarray:
            moved = w if t <= table.timesteps[N - last] else held
            negative, positive = (np.tanh(x * moved + states[:, k] + t / 1000) for k in range(2))
            return negative + 3.0 * (positive - negative)

        noise = [np.float64(given["step_noise"][:, i]) for i in range(N)]
        return float(np.mean(table.run(guided, np.float64(given["noise"]), noise)[-1] ** 2))

    def loss(params: Params) -> Any:
        run = sample(METHOD, params, given, plan, evaluations=N, gradient_evaluations=last)
        return jnp.mean(run["images"] ** 2)

    value, gradient = jax.jit(jax.value_and_grad(loss))(PARAMS)
    assert float(value) == pytest.approx(twin(held), rel=1e-6)
    h = 1e-5 * np.eye(4)
    wanted = [(twin(held + step) - twin(held - step)) / 2e-5 for step in h]
    np.testing.assert_allclose(gradient["w"], wanted, rtol=2e-5, atol=2e-6)


def test_how_many_are_differentiated_is_checked() -> None:
    plan = DDIM.plan(N, eta=1.0)
    for options in ({"evaluations": N, "gradient_evaluations": N + 1}, {"gradient_evaluations": 1}):
        with pytest.raises(ValueError, match="gradient_evaluations must be from 0 to evaluations="):
            sample(METHOD, PARAMS, rows(), plan, **options)  # type: ignore[arg-type]
