"""One step of every trainer of ``train/``, here and in PyTorch: the steps that ``tests/oracle`` compares, timed.

    python benchmarks/train_step.py --trainers all --batch 4 --rounds 5
    python benchmarks/train_step.py --trainers controlnet vae --source diffuse-jax/emoji --batch 8

A new trainer is a row of :data:`TRAINERS`: what makes its step on both sides. Both have the same networks, weights,
images and random numbers, which are drawn beforehand; frozen networks need no gradients, and what a script of diffusers
makes once (noise schedules, embeddings of no prompt) is made once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the steps of tests
sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import compete, resident_memory

from diffuse_jax import weights
from diffuse_jax.training.optimizer import make_optimizer
from diffuse_jax.training.settings import Average, ConsistencySettings
from diffuse_jax.training.state import AVERAGE, fresh_state, init_state, make_step
from tests.oracle import consistency_cases, pixel_cases, reward_cases, training_cases
from tests.oracle.training_steps import Steps
from tests.train import latent_models

RATE, AVERAGED = 1e-5, Average(decay=0.95, ramp=False)
GUIDANCE = 256
"""Width of the embedding of guidance scales in distillation."""


ONE_LEVEL = "one-level"
"""A Stable Diffusion whose UNet has one level of 64 channels on 32 x 32 latents: every program compiles in half a
minute."""


class Size(NamedTuple):
    """How large the steps are.

    Attributes:
      source: folder of a Stable Diffusion, whose networks and image size are taken.
      batch: images of a step.
      cores: how many processor cores each side has; all of them if 0.
    """

    source: Path
    batch: int
    cores: int = 0

    def config(self, name: str) -> dict[str, Any]:
        """The configuration of a network, without what its folder says of itself."""
        found = json.loads((self.source / name / "config.json").read_text())
        return {key: value for key, value in found.items() if not key.startswith("_")}

    @property
    def pixels(self) -> int:
        return self.config("unet")["sample_size"] * 2 ** (len(self.config("vae")["block_out_channels"]) - 1)


def source_of(name: str, folder: Path) -> Path:
    """The folder of a checkpoint; that of :data:`ONE_LEVEL` is made here."""
    if name != ONE_LEVEL:
        return weights.resolve(name)
    unet = latent_models.UNET.replace(block_out_channels=(64,), norm_num_groups=32, sample_size=32)
    vae = latent_models.VAE.replace(block_out_channels=(32, 32), norm_num_groups=8, sample_size=64)
    return latent_models.save_sd(folder, fresh=False, middle=latent_models.MIDDLE, unet=unet, vae=vae)


Make = Callable[[Size, Path, np.random.Generator], Steps]
"""Makes a step on both sides; the folder is for its files."""


def latent(case: Callable[..., Steps], **options: Any) -> Make:
    """A case of ``training_cases.py``, with the networks of the source."""

    def make(size: Size, folder: Path, rng: np.random.Generator) -> Steps:
        return case(folder, rng, save=lambda *_, **__: size.source, count=size.batch, **options)

    return make


def distillation(student: Callable[..., Steps]) -> Make:
    """A student of the source."""
    settings = ConsistencySettings(loss_type="huber")
    return lambda size, folder, rng: student(consistency_cases.Case(size.source, rng, settings, size.batch), folder)


def reward(case: Callable[..., Steps]) -> Make:
    """Rewards of the source's images."""
    return lambda size, folder, rng: case(size.source, rng, size.batch)


def pixels(kind: str) -> Make:
    """An unconditional UNet with the channels of the source's, of images as large as its latents, with attention at its
    last level."""

    def make(size: Size, folder: Path, rng: np.random.Generator) -> Steps:
        like = size.config("unet")
        levels = len(like["block_out_channels"]) - 1
        config = {
            **{
                name: like[name]
                for name in ("sample_size", "block_out_channels", "layers_per_block", "norm_num_groups")
            },
            "down_block_types": ("DownBlock2D",) * levels + ("AttnDownBlock2D",),
            "up_block_types": ("AttnUpBlock2D",) + ("UpBlock2D",) * levels,
        }
        return pixel_cases.unconditional(folder, rng, kind, config, like["sample_size"], size.batch)

    return make


def autoencoder(size: Size, folder: Path, rng: np.random.Generator) -> Steps:
    """The source's autoencoder."""
    return pixel_cases.autoencoder(folder, rng, size.config("vae"), size.pixels, size.batch)


UNET = ("unet",)
TRAINERS: Mapping[str, Make] = {
    "text_to_image": latent(training_cases.full, names=UNET),
    "text_to_image_lora": latent(training_cases.low_rank, names=UNET),
    "dreambooth": latent(training_cases.full, names=UNET, prior=True),
    "dreambooth_lora": latent(training_cases.low_rank, names=UNET, prior=True),
    "textual_inversion": latent(training_cases.inversion),
    "custom_diffusion": latent(training_cases.custom_diffusion),
    "controlnet": latent(training_cases.controlnet),
    "t2i_adapter": latent(training_cases.t2i_adapter),
    "instruct_pix2pix": latent(training_cases.instruct_pix2pix),
    "lcm_distillation": distillation(functools.partial(consistency_cases.whole_student, width=GUIDANCE)),
    "lcm_distillation_lora": distillation(lambda case, folder: consistency_cases.low_rank_student(case)),
    "reward: draft": reward(reward_cases.draft),
    "reward: ddpo": reward(reward_cases.ddpo),
    "unconditional: ddpm": pixels("ddpm"),
    "unconditional: edm": pixels("edm"),
    "unconditional: flow_matching": pixels("flow_matching"),
    "vae": autoencoder,
}
"""What makes the step of a script of ``train/``, and after a colon which of its objectives."""


def made(size: Size, name: str) -> tuple[Steps, str, int]:
    """The step of a trainer, the parameter whose gradient tells whether both sides do the same, and the bytes of all
    parameters. The process keeps to the cores it is given, which both libraries see."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: size.cores or None])
    with tempfile.TemporaryDirectory() as folder:
        steps = TRAINERS[name](size, Path(folder), np.random.default_rng(0))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((steps.trained.trainable, steps.trained.frozen)))
    return steps, max(steps.parameters, key=lambda key: (steps.parameters[key].numel(), key)), held


class Run:
    """Repeats a step; its first call returns the gradient of the watched parameter.

    Attributes:
      apart: bytes of the process beside the parameters, the step and what it needs.
    """

    def __init__(self, step: Callable[[], None], gradient: Callable[[], np.ndarray], apart: int) -> None:
        self.step, self.gradient, self.apart = step, gradient, apart
        self.seen: np.ndarray | None = None

    def __call__(self) -> np.ndarray:
        self.step()
        if self.seen is None:
            self.seen = self.gradient()
        return self.seen


def ours(size: Size, name: str) -> Run:
    """The JAX side: the compiled step of the trainers."""
    steps, watched, held = made(size, name)
    loss, trained, batch = steps.loss, steps.trained, jax.device_put(jax.tree.map(lambda x: x[None], dict(steps.batch)))
    del steps
    frozen, named = dict(trained.frozen), trained.named
    average = frozen.pop(AVERAGE, None)
    averaged = average is not None
    optimizer = make_optimizer("adamw", lambda _: RATE)
    shapes = jax.eval_shape(functools.partial(fresh_state, optimizer=optimizer, use_ema=averaged), trained.trainable)
    compiled = make_step(loss, optimizer, 0, AVERAGED).lower(shapes, frozen, batch).compile()
    jax.clear_caches()
    before = resident_memory()
    state = dataclasses.replace(init_state(trained.trainable, optimizer, use_ema=averaged), ema=average)
    del trained, average

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, frozen, batch))

    return Run(step, lambda: named(optax.tree.get(state.opt_state, "mu"))[watched], before - held)


def theirs(size: Size, name: str) -> Run:
    """The PyTorch side, with a thread for each core: tests leave it one."""
    import torch

    steps, watched, held = made(size, name)
    parameters, loss, averages = steps.parameters, steps.torch_loss, steps.averages
    del steps
    jax.clear_caches()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    before = resident_memory()
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE)

    def step() -> None:
        loss().loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for average, parameter in averages:
            average.detach().mul_(AVERAGED.decay).add_(parameter.detach(), alpha=1 - AVERAGED.decay)

    return Run(step, lambda: optimizer.state[parameters[watched]]["exp_avg"].numpy().copy(), before - held)


def rows(task: argparse.Namespace, figures: Callable[..., dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The table rows of one trainer of the task after the other, PyTorch's first; ``figures`` are those of a side.

    Raises:
      SystemExit: there is no such trainer.
    """
    chosen = list(TRAINERS) if task.trainers == ["all"] else task.trainers
    if unknown := [name for name in chosen if name not in TRAINERS]:
        raise SystemExit(f"there is no trainer {unknown[0]!r}; choose from: all, {', '.join(TRAINERS)}")
    with tempfile.TemporaryDirectory() as folder:
        size = Size(source_of(task.source, Path(folder)), task.batch, task.cores)
        for name in chosen:
            pixels = size.config("unet")["sample_size"] if name.startswith("unconditional") else size.pixels
            about = {"model": task.source.rpartition("/")[2], "trained": name, "batch": size.batch, "pixels": pixels}
            about |= {"remat": "none", "device": f"cpu, {task.cores} core" if task.cores else "cpu"}
            measured = compete({"PyTorch": (theirs, size, name), "diffuse_jax": (ours, size, name)}, task.rounds)
            memory = [row["peak_gib"] for row in measured]
            yield [
                about | figures(task, row) | {"step_gib": own, "memory_ratio": round(own / memory[0], 2)}
                for row, own in zip(measured, memory, strict=True)
            ]
