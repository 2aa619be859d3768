"""The torch twin of a plan's step against the plan itself, for every sampler."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from diffuse_jax.schedulers.plan import Plan
from tests.schedulers import samplers

torch = pytest.importorskip("torch")

from diffuse_jax.torch_backend import plan as twin  # noqa: E402

SHAPE = (2, 4, 4, 3)
advance = jax.jit(lambda plan, state, i, output, noise: plan.step(state, i, output, noise=noise))


def apart(plan: Plan, rng: np.random.Generator, channels: int = 3) -> float:
    """Largest difference of the samples along a run of random outputs, relative to the largest value."""
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    start, errors = normal(*SHAPE), []
    ours, theirs = plan.init(start), twin.first_state(twin.on_host(plan), torch.tensor(start))
    for i in range(int(plan.num_evaluations)):
        output, noise = normal(*SHAPE[:-1], channels), normal(*SHAPE)
        inputs = np.asarray(plan.model_input(ours, i)), twin.model_input(plan, theirs, i).numpy()
        np.testing.assert_allclose(*inputs, rtol=1e-5, atol=1e-5 * np.abs(inputs[0]).max())
        ours = advance(plan, ours, i, output, noise)
        theirs = twin.step(plan, theirs, i, torch.tensor(output), torch.tensor(noise))
        sample = np.asarray(ours.sample)
        errors.append(np.abs(sample - theirs.sample.numpy()).max() / max(1.0, np.abs(sample).max()))
    return float(max(errors))


@pytest.mark.parametrize("name", samplers.NAMES)
def test_every_sampler_steps_alike(name: str, rng: np.random.Generator) -> None:
    assert apart(samplers.make(name).plan(5), rng) < 1e-5


def test_thresholding_and_learned_variance(rng: np.random.Generator) -> None:
    thresholding = samplers.make("DDIMScheduler", thresholding=True, sample_max_value=1.5)
    assert apart(thresholding.plan(4), rng) < 1e-5
    for variance in ("learned", "learned_range"):
        scheduler = samplers.make("DDPMScheduler", variance_type=variance)
        assert apart(scheduler.plan(4), rng, channels=6) < 1e-5


@pytest.mark.parametrize("name", ["DDPMScheduler", "DPMSolverSDEScheduler", "DDIMScheduler"])
def test_the_noise_that_a_plan_draws_is_that_of_its_steps(name: str, rng: np.random.Generator) -> None:
    """Fresh noise, increments of a Brownian path, and none."""
    plan, keys = samplers.make(name).plan(4), jax.random.split(jax.random.key(3), SHAPE[0])
    state = plan.init(rng.standard_normal(SHAPE).astype(np.float32))
    output = rng.standard_normal(SHAPE).astype(np.float32)
    noise = jax.jit(lambda plan, i: plan.draw(i, SHAPE, keys))(plan, 1)
    assert bool(np.abs(noise).max() > 0) == samplers.stochastic(name)
    own = jax.jit(lambda plan, state: plan.step(state, 1, output, keys))(plan, state)
    np.testing.assert_allclose(advance(plan, state, 1, output, noise).sample, own.sample, rtol=1e-5, atol=1e-5)
