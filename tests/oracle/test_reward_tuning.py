"""One training step of DRaFT and of DDPO against PyTorch: the same weights, noise and trajectories."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax.pipelines.rollout import rollout
from diffuse_jax.sharding import make_mesh
from diffuse_jax.torch_backend import training
from diffuse_jax.torch_backend.training_report import TOLERANCES, compare_updates, verdict
from diffuse_jax.training.ddpo import ddpo_loss
from diffuse_jax.training.draft import draft_loss
from diffuse_jax.training.latent import open_pipeline
from diffuse_jax.training.policy import Policy, policy_from
from diffuse_jax.training.rewards import Reward
from diffuse_jax.training.settings import RewardSettings
from tests.train.latent_models import SIZE, save_sd

twin = pytest.importorskip("diffuse_jax.torch_backend.training_torch", reason="needs PyTorch diffusers, transformers")
torch = pytest.importorskip("torch")

from diffuse_jax.torch_backend.networks import channels_first, channels_last, to_torch  # noqa: E402

PROMPTS, SCALE, STEPS, LAST = ["a cat", "two dogs"], 3.0, 3, 2
LATENTS = (SIZE // 2, SIZE // 2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("sd"), fresh=False)


def settings(**options: Any) -> RewardSettings:
    return RewardSettings(
        reward="m:f", sample_num_steps=STEPS, sample_guidance_scale=SCALE, sample_eta=1.0, resolution=SIZE, **options
    )


def opened(folder: Path, options: RewardSettings) -> tuple[Any, Policy, Any]:
    """Our pipeline, its policy, and PyTorch's pipeline with DDIM."""
    trained = () if options.use_lora else ("unet",)
    pipe = open_pipeline(folder, trainable=trained, mesh=make_mesh(devices=jax.devices()[:1]))
    theirs = twin.open_reference(folder, trainable=trained, device="cpu")
    theirs.scheduler = twin.diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.scheduler.set_timesteps(STEPS)
    # PyTorch's schedule is a product of a thousand numbers in float32; densities magnify its error.
    betas = np.linspace(theirs.scheduler.config.beta_start**0.5, theirs.scheduler.config.beta_end**0.5, 1000) ** 2
    theirs.scheduler.alphas_cumprod = torch.tensor(np.cumprod(1 - betas))
    return pipe, policy_from(options, pipe), theirs


def rows_with_noise(policy: Policy, rng: np.random.Generator) -> Any:
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    noise = {"noise": draw(2, *LATENTS), "step_noise": draw(2, STEPS, *LATENTS)}
    return policy.rows(PROMPTS, [0, 1]) | noise


def guided(pipe: Any) -> Callable[[Any, Any], Any]:
    """``(x, t) -> noise`` of the frozen text encoder and the UNet, channels first."""
    words = {"padding": "max_length", "max_length": 16, "truncation": True, "return_tensors": "pt"}
    with torch.no_grad():
        states = pipe.text_encoder(pipe.tokenizer(["", "", *PROMPTS], **words).input_ids).last_hidden_state

    def predict(x: Any, t: Any) -> Any:
        empty, positive = pipe.unet(torch.cat([x, x]), t, states).sample.chunk(2)
        return empty + SCALE * (positive - empty)

    return predict


def redness(images: Any) -> Any:
    """Channel last; curved, so that its gradient depends on the image."""
    return (images[..., 0] ** 2 - images[..., 1] * images[..., 2]).mean((1, 2))


def compared(ours: Any, parameters: Any, loss: Any, exact: float) -> None:
    """All gradients and changes agree, the loss to ``exact`` and the median parameter after the step to 1e-5."""
    before = {name: p.detach().numpy().copy() for name, p in parameters.items()}
    theirs = twin.torch_step(parameters, lambda: twin.LossAndValues(found := loss(), {"loss": found}))
    found = compare_updates(ours, theirs, TOLERANCES["float32"])
    assert found.ok, verdict(found) + str([row for row in found.rows if not row.ok])
    assert {*theirs.gradients} == {*ours.gradients}
    wanted = float(theirs.values["loss"])
    assert abs(float(ours.values["loss"]) - wanted) <= exact * abs(wanted), (ours.values["loss"], wanted)
    moved = [
        np.linalg.norm(ours.changes[n] - theirs.changes[n]) / np.linalg.norm(before[n] + theirs.changes[n])
        for n in theirs.changes
    ]
    assert np.median(moved) < 1e-5, max(moved)
    print("loss", abs(float(ours.values["loss"]) - wanted) / abs(wanted), "parameters", np.median(moved), max(moved))


def test_draft(folder: Path, rng: np.random.Generator) -> None:
    """All weights of the UNet, through guidance, the last two steps of three and the decoder."""
    options = settings(method="draft", use_lora=False, gradient_steps=LAST)
    pipe, policy, theirs = opened(folder, options)
    reward = Reward("redness", lambda params, images, prompts: redness(images))
    frozen = {name: tree for name, tree in pipe.params.items() if name != "unet"} | {"reward": {}}
    trained = training.Trained({"unet": pipe.params["unet"]}, frozen, None, training.named_parameters)
    rows = rows_with_noise(policy, rng)
    ours = training.step_of(functools.partial(draft_loss, policy, reward, LAST), trained, {"rows": rows})

    def loss() -> Any:
        x, predict = channels_first(to_torch(rows["noise"], "cpu")), guided(theirs)
        for i, t in enumerate(theirs.scheduler.timesteps):
            noise = channels_first(to_torch(rows["step_noise"][:, i], "cpu"))
            with torch.set_grad_enabled(i >= STEPS - LAST):
                x = theirs.scheduler.step(predict(x, t), t, x, eta=1.0, variance_noise=noise).prev_sample
        images = theirs.vae.decode(x / theirs.vae.config.scaling_factor).sample
        return -redness(channels_last((images / 2 + 0.5).clamp(0, 1))).mean()

    compared(ours, twin.full_parameters(theirs, ("unet",)), loss, 1e-6)


def test_ddpo(folder: Path, rng: np.random.Generator) -> None:
    """Low-rank pairs, at the second step of trajectories, one of whose ratios is clipped."""
    pytest.importorskip("peft", reason="PyTorch diffusers loads LoRA through peft")
    options = settings(train_clip_range=1e-3)
    pipe, policy, theirs = opened(folder, options)
    trained = training.low_rank(pipe, ("unet",), rank=3, seed=0)
    trained = trained._replace(frozen=dict(pipe.params))
    rows, params = rows_with_noise(policy, rng), policy.combine(trained.trainable, trained.frozen)
    run = jax.jit(functools.partial(rollout, policy.method, evaluations=STEPS))
    found = jax.tree.map(np.asarray, run(params, rows, policy.plan))
    each, full = np.ones(2, np.float32), np.prod(LATENTS)
    batch = {
        "rows": rows, "before": found.samples[:, 1], "after": found.samples[:, 2], "i": np.full(2, 1, np.int32),
        "log_prob": found.log_probs[:, 1] - np.float32([5e-4, 4e-3]) * full, "advantage": np.float32([1.3, 0.7]),
        "reward_mean": each, "reward_std": each,
    }  # fmt: skip
    ours = training.step_of(functools.partial(ddpo_loss, policy, options), trained, batch)
    assert float(ours.values["clip_fraction"]) == 0.5

    def loss() -> Any:
        t, x, after = (
            theirs.scheduler.timesteps[1],
            *(channels_first(to_torch(batch[name], "cpu")) for name in ("before", "after")),
        )
        zero = torch.zeros_like(x)
        mean = theirs.scheduler.step(guided(theirs)(x, t), t, x, eta=1.0, variance_noise=zero).prev_sample
        std = theirs.scheduler._get_variance(int(t), int(t) - 1000 // STEPS) ** 0.5
        log_prob = torch.distributions.Normal(mean, std).log_prob(after).mean((1, 2, 3))
        ratio = torch.exp(log_prob - torch.tensor(batch["log_prob"] / full))
        advantage = torch.tensor(batch["advantage"])
        return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - 1e-3, 1 + 1e-3)).mean()

    compared(ours, twin.low_rank_parameters(theirs, trained.trainable), loss, 5e-6)
