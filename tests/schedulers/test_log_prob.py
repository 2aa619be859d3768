"""The density of a sampler's step, against closed formulas in float64 and against what steps draw."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffuse_jax import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from diffuse_jax.schedulers import Scheduler

SHAPE = (3, 4, 4, 2)
DDIM = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A sample, an output, and a sample after it."""
    x, output = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    return x, output, (x + 0.1 * rng.standard_normal(SHAPE)).astype(np.float32)


def ddim(x: np.ndarray, eps: np.ndarray, before: float, after: float, eta: float) -> tuple[np.ndarray, float]:
    """Mean and deviation of Song et al. 2020, equations 12 and 16, from two values of alpha bar."""
    std = eta * np.sqrt((1 - after) / (1 - before)) * np.sqrt(1 - before / after)
    x0 = (x - np.sqrt(1 - before) * eps) / np.sqrt(before)
    return np.sqrt(after) * x0 + np.sqrt(1 - after - std**2) * eps, std


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_is_the_gaussian_of_its_paper(eta: float, rng: np.random.Generator) -> None:
    plan, bar = DDIM.plan(4, eta=eta), np.cumprod(1 - np.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2)
    x, output, after = case(rng)
    for i in range(4):
        t = int(plan.timesteps[i])
        mean, std = ddim(np.float64(x), np.float64(output), bar[t], bar[max(t - 250, 0)], eta)
        wanted = stats.norm.logpdf(np.float64(after), mean, std).sum((1, 2, 3))
        np.testing.assert_allclose(plan.log_prob(plan.resume(x), i, output, after), wanted, rtol=2e-6)


def test_euler_ancestral_is_a_gaussian_around_a_step_to_a_lower_level(rng: np.random.Generator) -> None:
    """Karras et al. 2022 coordinates: ``x + (down - sigma) * eps``, then noise up to the next level."""
    scheduler = EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear")
    table, plan = scheduler.table(3), scheduler.plan(3)
    x, output, after = case(rng)
    (_, sigma), (_, target) = table.levels[0], table.levels[1]
    up = np.sqrt(target**2 * (sigma**2 - target**2) / sigma**2)
    mean = x + (np.sqrt(target**2 - up**2) - sigma) * np.float64(output)
    wanted = stats.norm.logpdf(np.float64(after), mean, up).sum((1, 2, 3))
    np.testing.assert_allclose(plan.log_prob(plan.resume(x), 0, output, after), wanted, rtol=2e-6)


SAMPLERS: list[tuple[Scheduler, dict[str, Any]]] = [
    (DDIM, {"eta": 1.0}),
    (DDIMScheduler(thresholding=True, clip_sample=False), {"eta": 0.5}),
    (DDPMScheduler(variance_type="fixed_large"), {}),
    (DDPMScheduler(variance_type="learned_range"), {}),
    (DDPMScheduler(variance_type="learned"), {}),
    (EulerAncestralDiscreteScheduler(), {}),
]


@pytest.mark.parametrize(("scheduler", "options"), SAMPLERS)
def test_a_step_draws_from_its_density(scheduler: Scheduler, options: dict[str, Any], rng: np.random.Generator) -> None:
    """The sample that noise ``z`` leads to has the density of ``z``, over the deviation."""
    plan, (x, output, _) = scheduler.plan(5, **options), case(rng)
    if scheduler.learned_variance:
        output = np.concatenate([output, 0.5 + 0.4 * np.tanh(output)], -1)
    z, state = rng.standard_normal(SHAPE).astype(np.float32), plan.resume(x)
    for i in (0, 3):
        after = plan.step(state, i, output, noise=z).sample
        mean, std = plan.transition(state, i, output)
        np.testing.assert_allclose((after - mean) / std, z, atol=2e-4)
        density = stats.norm.logpdf(np.float64(z)) - np.log(np.broadcast_to(np.float64(std), SHAPE))
        np.testing.assert_allclose(plan.log_prob(state, i, output, after), density.sum((1, 2, 3)), rtol=1e-4)


def test_samples_at_different_evaluations_have_their_own_density(rng: np.random.Generator) -> None:
    plan, (x, output, after) = DDIM.plan(4, eta=1.0), case(rng)
    index = jnp.array([3, 0, 2])
    found = jax.jit(type(plan).log_prob)(plan, plan.resume(x), index, output, after)
    for k, i in enumerate([3, 0, 2]):
        one = plan.log_prob(plan.resume(x[k : k + 1]), i, output[k : k + 1], after[k : k + 1])
        np.testing.assert_allclose(found[k], one[0], rtol=1e-6)


def test_a_step_without_noise_has_no_density_and_a_finite_gradient(rng: np.random.Generator) -> None:
    x, output, after = case(rng)
    plan = EulerDiscreteScheduler().plan(4)
    found, gradient = jax.value_and_grad(lambda y: plan.log_prob(plan.resume(x), 1, y, after).sum())(output)
    assert float(found) == 0
    assert not np.any(gradient)


def test_the_gradient_of_the_density_is_the_distance_from_the_mean(rng: np.random.Generator) -> None:
    plan, (x, output, after) = DDIM.plan(4, eta=1.0), case(rng)
    mean, std = plan.transition(plan.resume(x), 1, output)
    gradient = jax.grad(lambda y: plan.log_prob(plan.resume(x), 1, output, y).sum())(after)
    np.testing.assert_allclose(gradient, (mean - after) / std**2, rtol=1e-5)
