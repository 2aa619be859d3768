"""The density of ancestral steps against PyTorch: diffusers' own step for the mean and the variance, and its Normal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffuse_jax import DDIMScheduler, DDPMScheduler

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

FIELDS: dict[str, Any] = {"beta_schedule": "scaled_linear", "clip_sample": False}
SHAPE = (2, 4, 4, 3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim(eta: float, prediction_type: str, rng: np.random.Generator) -> None:
    fields = FIELDS | {"prediction_type": prediction_type, "set_alpha_to_one": False, "steps_offset": 1}
    plan, twin = DDIMScheduler(**fields).plan(10, eta=eta), diffusers.DDIMScheduler(**fields)
    twin.set_timesteps(10)
    for i, t in enumerate(twin.timesteps):
        x, output, after = (rng.standard_normal(SHAPE) for _ in range(3))
        given = {"eta": eta, "variance_noise": torch.zeros(SHAPE, dtype=torch.float64)}
        mean = twin.step(torch.tensor(output), t, torch.tensor(x), **given).prev_sample
        std = eta * twin._get_variance(int(t), int(t) - 100) ** 0.5
        after = mean.numpy() + float(std) * after
        wanted = torch.distributions.Normal(mean, std.double()).log_prob(torch.tensor(after)).sum((1, 2, 3))
        found = plan.log_prob(plan.resume(x), i, output.astype(np.float32), after)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm(variance_type: str, rng: np.random.Generator) -> None:
    fields = FIELDS | {"variance_type": variance_type}
    plan, twin = DDPMScheduler(**fields).plan(10), diffusers.DDPMScheduler(**fields)
    twin.set_timesteps(10)
    for i, t in enumerate(twin.timesteps[:-1]):  # the last step draws nothing
        x, output, after = (rng.standard_normal(SHAPE) for _ in range(3))
        step = lambda z: twin.step(torch.tensor(output), t, torch.tensor(x), generator=z).prev_sample  # noqa: B023
        one, other = (step(torch.Generator().manual_seed(seed)) for seed in (0, 1))
        draws = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
                    for s in (0, 1)]  # fmt: skip
        std = ((one - other) / (draws[0] - draws[1])).median()
        mean = one - std * draws[0]
        after = mean.numpy() + float(std) * after
        wanted = torch.distributions.Normal(mean, std).log_prob(torch.tensor(after)).sum((1, 2, 3))
        found = plan.log_prob(plan.resume(x), i, output.astype(np.float32), after)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-4)
