"""Learning rates, running averages and whole updates against PyTorch diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.schedulers import DDPMScheduler
from diffuse_jax.training.objective import Objective, draw, errors, noised
from diffuse_jax.training.optimizer import learning_rate, make_optimizer
from diffuse_jax.training.state import Average, ema_rate, ema_update, init_state, make_step
from diffuse_jax.weights.names import flatten, to_torch, torch_key

twins = pytest.importorskip("tests.oracle.twins", reason="needs PyTorch diffusers and transformers")
torch, diffusers = twins.torch, twins.diffusers

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


BATCH, RATE = 4, 1e-3
OBJECTIVES: dict[str, dict[str, Any]] = {
    "epsilon": {},
    "velocity, Min-SNR": {"prediction_type": "v_prediction", "snr_gamma": 5.0},
    "clean sample": {"prediction_type": "sample"},
    "clean sample, as the noise's error": {"prediction_type": "sample", "snr_weighting": True},
    "noise offset": {"noise_offset": 0.1},
}


@pytest.mark.parametrize("kind", ["text", "pixels"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_update(name: str, kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """The same weights, noise and timesteps give the same loss and the same parameters after AdamW."""
    make = (twins.unet_twin, "SD 2.x") if kind == "text" else (twins.pixel_unet_twin, "DDPM")
    module, model, params = make[0](make[1], tmp_path)
    settings = dict(OBJECTIVES[name])
    scheduler = DDPMScheduler(prediction_type=settings.pop("prediction_type", "epsilon"), beta_schedule="scaled_linear")
    objective = Objective(scheduler=scheduler, **settings)
    x0 = jnp.asarray(rng.standard_normal((BATCH, 8, 8, model.config.in_channels)), jnp.float32)
    text = rng.standard_normal((BATCH, 5, 24)).astype(np.float32)
    drawn = draw(objective, jax.random.key(0), x0)._replace(t=jnp.array([0, 250, 600, 999]))

    def loss(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
        more = (text,) if kind == "text" else ()
        return errors(
            objective, model.apply({"params": params}, noised(objective, x0, drawn), drawn.t, *more), x0, drawn
        )

    optimizer = make_optimizer("adamw", lambda _: RATE, weight_decay=0.01)
    step = make_step(loss, optimizer, seed=0)
    state, metrics = step(init_state(params, optimizer, use_ema=False), {}, np.zeros((1, BATCH)))
    theirs = torch_update(module, objective, np.asarray(x0), text if kind == "text" else None, drawn)
    assert float(metrics["loss"]) == pytest.approx(theirs, rel=1e-5)
    after = {torch_key(path): np.asarray(to_torch(path, leaf)) for path, leaf in flatten(state.params).items()}
    for key, value in module.named_parameters():
        # Adam divides by the root of a gradient's square, so where a gradient is all rounding its sign may differ.
        settled = np.abs(value.grad.numpy()) > 1e-6
        np.testing.assert_allclose(after[key][settled], value.detach().numpy()[settled], atol=1e-4, err_msg=key)


def torch_update(module: Any, objective: Objective, x0: np.ndarray, text: Any, drawn: Any) -> float:
    """One update of the PyTorch twin, written as its users write it; returns the loss."""
    first = lambda x: torch.tensor(np.asarray(x).transpose(0, 3, 1, 2).copy())
    kind = objective.scheduler.prediction_type
    scheduler = diffusers.DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear")
    clean, noise, t = first(x0), first(drawn.noise), torch.tensor(np.asarray(drawn.t)).long()
    more = {} if text is None else {"encoder_hidden_states": torch.tensor(text)}
    prediction = module(scheduler.add_noise(clean, noise, t), t, **more).sample
    wanted = {"epsilon": noise, "v_prediction": scheduler.get_velocity(clean, noise, t), "sample": clean}[kind]
    error = (prediction - wanted).square().mean((1, 2, 3))
    if objective.snr_weighting:
        alpha_bar = torch.cumprod(1 - scheduler.betas.double(), 0)[t]  # in float32, 1 - alpha_bar is rounding at t = 0
        error = error * (alpha_bar / (1 - alpha_bar)).float()
    if objective.snr_gamma is not None:
        snr = diffusers.training_utils.compute_snr(scheduler, t)
        s = snr + 1 if kind == "v_prediction" else snr
        error = error * torch.minimum(s, torch.full_like(s, objective.snr_gamma)) / s
    loss = error.mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.01).step()
    return float(loss)
