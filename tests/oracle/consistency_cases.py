"""One step of latent consistency distillation on both sides, from the formulas of the paper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.adapters.targets import UNET_TARGETS
from diffuse_jax.pipelines.parts.network import strength_embedding
from diffuse_jax.sharding import make_mesh
from diffuse_jax.torch_backend import training
from diffuse_jax.torch_backend import training_torch as twin
from diffuse_jax.torch_backend.networks import channels_first, channels_last, to_torch
from diffuse_jax.torch_backend.training_parity import TrainingRequest, resolution_for
from diffuse_jax.training.consistency import consistency_from, consistency_loss_of, draw, frozen_from, with_guidance
from diffuse_jax.training.data import Example
from diffuse_jax.training.initial import initial_params
from diffuse_jax.training.latent import networks, open_pipeline, whole, with_lora
from diffuse_jax.training.settings import ConsistencySettings
from diffuse_jax.training.state import AVERAGE
from tests.oracle import twins
from tests.oracle.training_steps import Steps

torch, diffusers = twins.torch, twins.diffusers

PROMPTS = ["a cat", "two dogs, one hat", "x", ""]
WIDTH = 8
"""Of the embedding of guidance scales."""


class Case:
    """A teacher on both sides, ``count`` captioned images, and the random numbers of the step."""

    def __init__(self, folder: Path, rng: np.random.Generator, settings: ConsistencySettings, count: int = 4) -> None:
        self.pipe = open_pipeline(folder, trainable=(), mesh=make_mesh(devices=jax.devices()[:1]))
        self.theirs = twin.open_reference(folder, trainable=(), device="cpu")
        self.teacher = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
        self.distillation = consistency_from(settings, self.pipe)
        self.frozen = frozen_from(self.pipe, ())
        size = (resolution_for(self.pipe, TrainingRequest()),) * 2
        images = rng.integers(0, 256, (count, *size, 3), np.uint8)
        texts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
        examples = [Example(x, text, (40, 50), (1, 2), size, 0, 0, "", None, None) for x, text in zip(images, texts)]
        self.batch = training.batch_of(self.pipe, examples)
        side = size[0] // self.pipe.components["vae"].config.scale
        self.latents = (count, side, side, 4)

    def draws(self) -> tuple[np.ndarray, Any]:
        """The noise of the latents' distribution, and what the loss draws, by the keys of the first step."""
        k_begin, k_draw = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0))
        drawn = jax.tree.map(np.asarray, draw(self.distillation, k_draw, jnp.zeros(self.latents)))
        return np.asarray(jax.random.normal(k_begin, self.latents, jnp.float32)), drawn

    def caller(self, unet: Any, *, guided: int = 0) -> Callable[[Any, Any, Any], Any]:
        """A UNet as a function ``(x, t, text) -> output`` of channel-last arrays; ``guided`` is the width of the
        embedding of ``w`` that it takes.

        The embedding is ours, since its angles, up to 15,000, have an error of 1e-4 in float32.
        """
        condition = {}
        if guided:
            condition["timestep_cond"] = to_torch(strength_embedding(jnp.asarray(self.draws()[1].w), guided), "cpu")
        sizes = to_torch(self.batch["time_ids"], "cpu") if "time_ids" in self.batch else None

        def call(x: Any, t: Any, text: Any) -> Any:
            added = {} if text.pooled is None else {"text_embeds": text.pooled, "time_ids": sizes}
            found = unet(channels_first(x), t, text.states, **condition, added_cond_kwargs=added or None)
            return channels_last(found.sample)

        return call

    def steps(self, trained: training.Trained, parameters: Any, student: Any, target: Any, averages: Any = ()) -> Steps:
        loss = consistency_loss_of(self.pipe, trained.combine, self.distillation)
        torch_loss = torch_loss_of(self, student, target, self.caller(self.teacher))
        return Steps(loss, trained, self.batch, parameters, torch_loss, averages)


def torch_loss_of(case: Case, student: Any, target: Any, teacher: Any) -> Callable[[], Any]:
    """PyTorch's loss of networks as :meth:`Case.caller` makes them. What a script makes once is made here: the noise
    schedule and the embeddings of no prompt."""
    settings, pipe, batch = case.distillation.settings, case.theirs, case.batch
    latent_noise, drawn = case.draws()
    latent_noise, noise, w = (to_torch(a, "cpu") for a in (latent_noise, drawn.noise, drawn.w))
    config = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    alpha_bar = torch.cumprod(1 - config.betas.double(), 0)
    stride = len(alpha_bar) // settings.num_ddim_timesteps
    start = to_torch(drawn.position, "cpu").long() * stride + stride - 1
    end = (start - stride).clamp(min=0)
    level = lambda t: tuple(f.float().reshape(-1, 1, 1, 1) for f in (alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()))

    with torch.no_grad():
        text = twin.encode_prompts(pipe, batch, pipe.device)
        if text.pooled is None:
            ids = pipe.tokenizer([""], padding="max_length", max_length=text.states.shape[1]).input_ids
            empty = text._replace(states=pipe.text_encoder(torch.tensor(ids))[0].expand_as(text.states))
        else:
            empty = twin.Text(torch.zeros_like(text.states), torch.zeros_like(text.pooled))

    def means(x: Any, v: Any, t: Any) -> tuple[Any, Any]:
        alpha, sigma = level(t)
        return alpha * x - sigma * v, alpha * v + sigma * x

    def f(network: Any, x: Any, t: Any, text: Any) -> Any:
        scaled = (10.0 * t.float()).reshape(-1, 1, 1, 1)
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        return c_skip * x + c_out * means(x, network(x, t, text), t)[0]

    def loss() -> Any:
        with torch.no_grad():
            posterior = pipe.vae.encode(channels_first(to_torch(batch["pixel_values"], "cpu")) / 127.5 - 1).latent_dist
            x0 = channels_last(posterior.mean) + channels_last(posterior.std) * latent_noise
            x0 = x0 * pipe.vae.config.scaling_factor
            text = twin.encode_prompts(pipe, batch, x0.device)
            alpha, sigma = level(start)
            x = alpha * x0 + sigma * noise
            asked, unasked = (means(x, teacher(x, start, prompt), start) for prompt in (text, empty))
            clean, eps = (a + w.reshape(-1, 1, 1, 1) * (a - b) for a, b in zip(asked, unasked))
            alpha, sigma = level(end)
            wanted = f(target, alpha * clean + sigma * eps, end, text)
        squares = (f(student, x, start, text) - wanted).square()
        if settings.loss_type == "huber":
            return twin.LossAndValues(((squares + settings.huber_c**2).sqrt() - settings.huber_c).mean(), {})
        return twin.LossAndValues(squares.mean(), {})

    return loss


def whole_student(case: Case, folder: Path, width: int = WIDTH) -> Steps:
    """All weights of a student that takes the guidance scale, whose target is its running average."""
    student = with_guidance(case.pipe, width)
    net, params = student.components["unet"], student.params["unet"]
    assert not np.any(params["time_embedding"]["cond_proj"]["kernel"]), "it predicts what the teacher does at first"
    fresh = initial_params(net.shapes(), 5, ())
    params = jax.tree.map(lambda x, r: x + 0.1 * jnp.asarray(r), params, fresh)
    average = jax.tree.map(lambda x, r: x - 0.1 * jnp.asarray(r), params, fresh)
    opened = {}
    for name, tree in {"student": params, "average": average}.items():
        net.save_pretrained(folder / name, tree)
        opened[name] = diffusers.UNet2DConditionModel.from_pretrained(folder / name).requires_grad_(False)
    frozen = {**case.frozen, AVERAGE: {"unet": average}}
    trained = training.Trained({"unet": params}, frozen, whole(networks(student)), training.named_parameters)
    case.theirs.register_modules(unet=opened["student"])
    parameters = twin.full_parameters(case.theirs, ["unet"])
    averages = list(zip(opened["average"].parameters(), opened["student"].parameters(), strict=True))
    calls = (case.caller(opened[name], guided=width) for name in ("student", "average"))
    return case.steps(trained, parameters, *calls, averages)


def low_rank_student(case: Case) -> Steps:
    """Low-rank pairs of all layers that the trainer adapts by default, whose target is themselves."""
    trained = training.low_rank(case.pipe, ["unet"], rank=3, seed=0, targets=UNET_TARGETS)
    trained = trained._replace(frozen=case.frozen, combine=with_lora(networks(case.pipe)))
    parameters = twin.low_rank_parameters(case.theirs, trained.trainable)
    student = case.caller(case.theirs.unet)
    return case.steps(trained, parameters, student, student)
