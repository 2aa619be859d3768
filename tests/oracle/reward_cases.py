"""One training step of DRaFT and of DDPO on both sides: the same weights, noise and trajectories."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from torch.utils.checkpoint import checkpoint

from diffuse_jax.pipelines.rollout import rollout
from diffuse_jax.sharding import make_mesh
from diffuse_jax.torch_backend import training
from diffuse_jax.torch_backend import training_torch as twin
from diffuse_jax.torch_backend.networks import channels_first, channels_last, to_torch
from diffuse_jax.torch_backend.training_parity import TrainingRequest, resolution_for
from diffuse_jax.training.ddpo import ddpo_loss
from diffuse_jax.training.draft import draft_loss
from diffuse_jax.training.latent import open_pipeline
from diffuse_jax.training.policy import Policy, policy_from
from diffuse_jax.training.rewards import Reward
from diffuse_jax.training.settings import RewardSettings
from tests.oracle import twins
from tests.oracle.training_steps import Steps

torch = twins.torch

PROMPTS, SCALE, STEPS, LAST = ["a cat", "two dogs"], 3.0, 3, 2


class Case:
    """Our pipeline and its policy, PyTorch's pipeline with DDIM, and a request with its noise."""

    def __init__(self, folder: Path, rng: np.random.Generator, count: int, **options: Any) -> None:
        trained = () if options.get("use_lora", True) else ("unet",)
        self.pipe = open_pipeline(folder, trainable=trained, mesh=make_mesh(devices=jax.devices()[:1]))
        size = resolution_for(self.pipe, TrainingRequest())
        self.settings = RewardSettings(
            reward="m:f", sample_num_steps=STEPS, sample_guidance_scale=SCALE, sample_eta=1.0, resolution=size,
            **options,
        )  # fmt: skip
        self.policy = policy_from(self.settings, self.pipe)
        self.theirs = twin.open_reference(folder, trainable=trained, device="cpu")
        self.theirs.scheduler = ddim(self.theirs.scheduler.config)
        self.prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
        side = size // self.pipe.components["vae"].config.scale
        self.latents = (side, side, 4)
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        noise = {"noise": draw(count, *self.latents), "step_noise": draw(count, STEPS, *self.latents)}
        self.rows = self.policy.rows(self.prompts, list(range(count))) | noise


def ddim(config: Any) -> Any:
    """PyTorch's DDIM, at the timesteps of the case."""
    scheduler = twin.diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    if not scheduler.config.rescale_betas_zero_snr:
        # PyTorch's schedule is a product of a thousand numbers in float32; densities magnify its error.
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000) ** 2
        scheduler.alphas_cumprod = torch.tensor(np.cumprod(1 - betas))
    return scheduler


def guided(pipe: Any, prompts: Sequence[str]) -> Callable[[], Callable[[Any, Any], Any]]:
    """Makes ``(x, t) -> noise`` of the frozen text encoder, which runs once, and the UNet; channels first."""
    length = pipe.text_encoder.config.max_position_embeddings
    words = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    ids = pipe.tokenizer([*[""] * len(prompts), *prompts], **words).input_ids

    def encode() -> Callable[[Any, Any], Any]:
        with torch.no_grad():
            states = pipe.text_encoder(ids).last_hidden_state

        def predict(x: Any, t: Any) -> Any:
            empty, positive = pipe.unet(torch.cat([x, x]), t, states).sample.chunk(2)
            return empty + SCALE * (positive - empty)

        return predict

    return encode


def redness(images: Any) -> Any:
    """Channel last; curved, so that its gradient depends on the image."""
    return (images[..., 0] ** 2 - images[..., 1] * images[..., 2]).mean((1, 2))


def draft(folder: Path, rng: np.random.Generator, count: int = 2) -> Steps:
    """All weights of the UNet, through guidance, the last two steps of three and the decoder. As in TRL's AlignProp,
    PyTorch computes the UNet again in the backward pass, which ours does too."""
    case = Case(folder, rng, count, method="draft", use_lora=False, gradient_steps=LAST)
    pipe, theirs, rows = case.pipe, case.theirs, case.rows
    reward = Reward("redness", lambda params, images, prompts: redness(images))
    frozen = {name: tree for name, tree in pipe.params.items() if name != "unet"} | {"reward": {}}
    trained = training.Trained({"unet": pipe.params["unet"]}, frozen, None, training.named_parameters)
    encode = guided(theirs, case.prompts)
    start, *noises = (
        channels_first(to_torch(a, "cpu")) for a in (rows["noise"], *np.moveaxis(rows["step_noise"], 1, 0))
    )

    def loss() -> Any:
        x, predict = start, encode()
        for i, (t, noise) in enumerate(zip(theirs.scheduler.timesteps, noises, strict=True)):
            with torch.set_grad_enabled(i >= STEPS - LAST):
                found = checkpoint(predict, x, t, use_reentrant=False)
                x = theirs.scheduler.step(found, t, x, eta=1.0, variance_noise=noise).prev_sample
        images = theirs.vae.decode(x / theirs.vae.config.scaling_factor).sample
        value = -redness(channels_last((images / 2 + 0.5).clamp(0, 1))).mean()
        return twin.LossAndValues(value, {"loss": value})

    ours = functools.partial(draft_loss, case.policy, reward, LAST)
    return Steps(ours, trained, {"rows": rows}, twin.full_parameters(theirs, ("unet",)), loss)


def ddpo(folder: Path, rng: np.random.Generator, count: int = 2, clip: float = 1e-3) -> Steps:
    """Low-rank pairs, at the second step of trajectories, every second of whose ratios is clipped."""
    case = Case(folder, rng, count, train_clip_range=clip)
    policy, theirs, rows = case.policy, case.theirs, case.rows
    trained = training.low_rank(case.pipe, ("unet",), rank=3, seed=0)
    trained = trained._replace(frozen=dict(case.pipe.params))
    found = trajectories(policy, trained, rows)
    each, full, odd = np.ones(count, np.float32), np.prod(case.latents), np.arange(count) % 2 == 1
    batch = {
        "rows": rows, "before": found.samples[:, 1], "after": found.samples[:, 2], "i": np.full(count, 1, np.int32),
        "log_prob": found.log_probs[:, 1] - np.where(odd, np.float32(4e-3), np.float32(5e-4)) * full,
        "advantage": np.where(odd, np.float32(0.7), np.float32(1.3)), "reward_mean": each, "reward_std": each,
    }  # fmt: skip
    encode, t = guided(theirs, case.prompts), theirs.scheduler.timesteps[1]
    x, after = (channels_first(to_torch(batch[name], "cpu")) for name in ("before", "after"))
    before, advantage = torch.tensor(batch["log_prob"] / full), torch.tensor(batch["advantage"])
    std = theirs.scheduler._get_variance(int(t), int(t) - 1000 // STEPS) ** 0.5

    def loss() -> Any:
        predict, zero = encode(), torch.zeros_like(x)
        mean = theirs.scheduler.step(predict(x, t), t, x, eta=1.0, variance_noise=zero).prev_sample
        log_prob = torch.distributions.Normal(mean, std).log_prob(after).mean((1, 2, 3))
        ratio = torch.exp(log_prob - before)
        value = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
        return twin.LossAndValues(value, {"loss": value})

    parameters = twin.low_rank_parameters(theirs, trained.trainable)
    return Steps(functools.partial(ddpo_loss, policy, case.settings), trained, batch, parameters, loss)


def trajectories(policy: Policy, trained: training.Trained, rows: Any) -> Any:
    """Sampled trajectories of the policy, as NumPy arrays."""
    run = jax.jit(functools.partial(rollout, policy.method, evaluations=STEPS))
    return jax.tree.map(np.asarray, run(policy.combine(trained.trainable, trained.frozen), rows, policy.plan))
