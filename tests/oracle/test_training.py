"""Learning rates, running averages and whole training steps against PyTorch diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.schedulers import DDPMScheduler
from diffuse_jax.torch_backend.training_report import verdict
from diffuse_jax.training.objective import Objective
from diffuse_jax.training.optimizer import learning_rate
from diffuse_jax.training.settings import Average
from diffuse_jax.training.state import ema_rate, ema_update

twins = pytest.importorskip("tests.oracle.twins", reason="needs PyTorch diffusers and transformers")
torch, diffusers = twins.torch, twins.diffusers

from tests.oracle.pixel_cases import Pair, convolution, ddpm, images_for, pixel_unet, unet  # noqa: E402

PEAK, WARMUP, TOTAL = 3e-4, 7, 40
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("constant", {}, {}),
    ("constant_with_warmup", {}, {}),
    ("linear", {}, {}),
    ("cosine", {}, {}),
    ("cosine_with_restarts", {"cycles": 3}, {"num_cycles": 3}),
    ("polynomial", {"power": 2.0}, {"power": 2.0}),
    ("piecewise_constant", {"rules": "1:10,0.1:20,0.01:30,0.005"}, {"step_rules": "1:10,0.1:20,0.01:30,0.005"}),
]


@pytest.mark.parametrize(("name", "ours", "theirs"), CASES, ids=[case[0] for case in CASES])
def test_learning_rate(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    steps = {"num_warmup_steps": WARMUP, "num_training_steps": TOTAL}
    scheduler = diffusers.optimization.get_scheduler(name, optimizer=optimizer, **steps, **theirs)
    rate = learning_rate(name, PEAK, WARMUP, TOTAL, **ours)
    for step in range(TOTAL + 1):
        assert float(rate(jnp.int32(step))) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-5, abs=1e-10), step
        optimizer.step()
        scheduler.step()


def test_running_average(rng: np.random.Generator) -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    theirs = diffusers.training_utils.EMAModel([parameter], decay=0.9)
    ours = jnp.zeros(4)
    for n in range(1, 30):
        value = rng.standard_normal(4).astype(np.float32)
        parameter.data.copy_(torch.tensor(value))
        theirs.step([parameter])
        ours = ema_update(ours, jnp.asarray(value), ema_rate(jnp.int32(n), Average(decay=0.9)))
        np.testing.assert_allclose(ours, theirs.shadow_params[0].numpy(), atol=1e-6)


OBJECTIVES: dict[str, dict[str, Any]] = {
    "epsilon": {},
    "velocity, Min-SNR": {"prediction_type": "v_prediction", "snr_gamma": 5.0},
    "clean sample": {"prediction_type": "sample"},
    "clean sample, as the noise's error": {"prediction_type": "sample", "snr_weighting": True},
    "noise offset": {"noise_offset": 0.1},
}


# The ordinary suite has the gradient of a text-to-image UNet in test_training_latent.py.
NETWORKS = [pytest.param(unet, "epsilon", marks=pytest.mark.slow), (pixel_unet, "epsilon")]


@pytest.mark.parametrize(("make", "name"), [*NETWORKS, *((convolution, name) for name in OBJECTIVES)])
def test_one_training_step(make: Callable[..., Pair], name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """The same weights, noise and timesteps give the same loss, gradients and parameters after AdamW."""
    pair = make(tmp_path, rng)
    settings = dict(OBJECTIVES[name])
    schedule = {"prediction_type": settings.pop("prediction_type", "epsilon"), "beta_schedule": "scaled_linear"}
    objective = Objective(scheduler=DDPMScheduler(**schedule), **settings)
    x0 = images_for(rng, 3 if make is pixel_unet else 4)
    steps = ddpm(pair, objective, x0, jnp.array([0, 250, 600, 999]), **schedule)
    compared = steps.compared()
    assert compared.ok, verdict(compared)
    assert len(compared.changes) == len(steps.parameters)
