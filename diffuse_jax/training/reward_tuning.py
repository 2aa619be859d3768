"""Tuning a text-to-image model to a reward of its images, by one of two methods: what a run needs of either.

:mod:`~diffuse_jax.training.ddpo` needs only the values of the reward, :mod:`~diffuse_jax.training.draft` its gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from diffuse_jax.models import Params
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.pipelines.parts.adapted import LORA
from diffuse_jax.training.ddpo import Rollouts, ddpo_loss, rounds_from, run_of_rounds
from diffuse_jax.training.draft import REWARD, DraftBatches, draft_loss
from diffuse_jax.training.families import trained_family
from diffuse_jax.training.families.base import changed_settings
from diffuse_jax.training.low_rank import lora_shapes
from diffuse_jax.training.policy import policy_from
from diffuse_jax.training.rewards import Reward
from diffuse_jax.training.settings import LoraSettings, RewardSettings, RunSettings
from diffuse_jax.training.state import Metrics


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What a run of reward tuning gives to :func:`~diffuse_jax.training.loop.fit`."""

    run: RunSettings
    loss: Callable[..., tuple[jax.Array, Metrics]]
    batches: DraftBatches | Rollouts
    frozen: Params


def trained_shapes(settings: RewardSettings, lora: LoraSettings, pipe: DiffusionPipeline) -> dict[str, Params]:
    """The shapes of what is trained, by network; those of the pipeline's parameters are enough.

    Raises:
      ValueError: low-rank pairs are described, but none are trained; or as for
        :func:`~diffuse_jax.training.low_rank.lora_shapes`.
    """
    name = trained_family(pipe).denoiser
    if settings.use_lora:
        return lora_shapes(lora, pipe, (name,))
    if given := next(changed_settings(lora), None):
        raise ValueError(f"--{given[0]} is about low-rank pairs, and --no-use_lora trains none; leave out one of them")
    return {name: pipe.params[name]}


def tuning_from(
    settings: RewardSettings,
    run: RunSettings,
    pipe: DiffusionPipeline,
    reward: Reward,
    prompts: Sequence[str],
    mesh: Mesh,
) -> Tuning:
    """The loss and the batches of either method.

    Args:
      settings: the settings of the method.
      run: the settings of the run.
      pipe: the pipeline; its parameters' shapes are enough to check the settings.
      reward: the reward, already checked.
      prompts: the prompts of the images.
      mesh: the mesh of the run.

    Raises:
      ValueError: the settings do not fit together or the model.
    """
    policy, trained = policy_from(settings, pipe), () if settings.use_lora else (trained_family(pipe).denoiser,)
    frozen = {name: pipe.params[name] for name in policy.method.networks if name not in (*trained, LORA)}
    if settings.method == "draft":
        batches = DraftBatches(policy, reward, prompts, run.batch, mesh, run.seed)
        loss = functools.partial(draft_loss, policy, reward, settings.gradient_steps)
        return Tuning(run, loss, batches, {**frozen, REWARD: reward.params})
    rounds = rounds_from(settings, policy, run.batch, mesh)
    rollouts = Rollouts(policy, reward, settings, rounds, prompts, frozen, mesh, run.seed)
    loss = functools.partial(ddpo_loss, policy, settings)
    return Tuning(run_of_rounds(run, rounds), loss, rollouts, frozen)
