"""DDPO: policy gradients for rewards that need not be differentiable.

Black et al. 2023, 'Training Diffusion Models with Reinforcement Learning' (arXiv 2305.13301): the steps of an ancestral
sampler are the actions of a policy, and their log-densities, weighted by how good the images were, are increased.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from diffuse_jax.models import Params
from diffuse_jax.pipelines.rollout import random_evaluations, rollout, step_log_prob
from diffuse_jax.sharding import automatic, readable
from diffuse_jax.training.batches import Batch
from diffuse_jax.training.data.loader import process_rows
from diffuse_jax.training.distributed import say
from diffuse_jax.training.policy import Policy, chosen
from diffuse_jax.training.rewards import Reward, values_of
from diffuse_jax.training.settings import BatchSettings, RewardSettings, RunSettings
from diffuse_jax.training.start import to_mesh
from diffuse_jax.training.state import Metrics


def ddpo_loss(
    policy: Policy, settings: RewardSettings, trainable: Params, frozen: Params, batch: Any, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """The clipped, importance-weighted loss of a step of some trajectories (section 4.3; Schulman et al. 2017, eq. 7).

    As in the authors' code, the log-density is the mean over the sample's elements, which makes the ratio that of
    densities to the power of one over their number. ``batch`` has ``rows`` of a request, the samples ``before`` and
    ``after``, the index ``i [B]`` of the evaluation between them, the same for all, its density ``log_prob [B]`` when
    it was sampled, and the trajectory's ``advantage [B]``; ``reward_mean`` and ``reward_std`` are passed on.
    """
    params = policy.combine(trainable, frozen)
    before, after = batch["before"], batch["after"]
    found = step_log_prob(policy.method, params, batch["rows"], policy.plan, batch["i"][0], before, after)
    change = (found - batch["log_prob"]) / math.prod(before.shape[1:])
    ratio, limit, advantage = jnp.exp(change), settings.train_clip_range, batch["advantage"]
    clipped = jnp.clip(ratio, 1 - limit, 1 + limit)
    loss = jnp.maximum(-advantage * ratio, -advantage * clipped).mean()
    return loss, {
        "approx_kl": 0.5 * jnp.square(change).mean(),
        "clip_fraction": (jnp.abs(ratio - 1) > limit).astype(jnp.float32).mean(),
        "reward_mean": batch["reward_mean"].mean(),
        "reward_std": batch["reward_std"].mean(),
    }


class PromptStatistics:
    """The recent rewards of every prompt (section 4.3 and appendix D.3).

    Args:
      size: number of rewards that are kept per prompt.
      least: with fewer, a prompt's rewards are normalised by those of the round.
    """

    def __init__(self, size: int, least: int) -> None:
        self._size, self._least = size, least
        self.recent: dict[str, deque[float]] = {}

    def advantages(self, prompts: Sequence[str], rewards: np.ndarray) -> np.ndarray:
        """Normalised rewards, after these have been added to the recent ones, float64 ``[B]``."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self.recent.setdefault(prompt, deque(maxlen=self._size)).append(reward)
        enough = lambda prompt: len(self.recent[prompt]) >= self._least
        known = {prompt: np.array(self.recent[prompt]) if enough(prompt) else rewards for prompt in {*prompts}}
        levels = {prompt: (values.mean(), values.std() + 1e-6) for prompt, values in known.items()}
        return np.array([(r - levels[p][0]) / levels[p][1] for p, r in zip(prompts, rewards, strict=True)])


def normalised(rewards: np.ndarray) -> np.ndarray:
    """Rewards minus their mean, divided by their standard deviation, float64 ``[B]``."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-8)


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The arithmetic of rounds: samples, then several passes of training steps over them.

    Attributes:
      sampled: number of images that are sampled at once, over all devices.
      batches: number of times that this happens in a round.
      steps: indices of the evaluations that are random.
      trained: number of them that each pass trains on.
      batch: ``train_batch_size`` and ``gradient_accumulation_steps`` of whole trajectories.
      part: trajectories per accumulation step, over all devices.
      passes: number of passes.
    """

    sampled: int
    batches: int
    steps: np.ndarray
    trained: int
    batch: BatchSettings
    part: int
    passes: int

    @property
    def images(self) -> int:
        """The number of images in a round."""
        return self.sampled * self.batches

    @property
    def accumulated(self) -> int:
        """The accumulation steps of a training step: one for each evaluation of each part."""
        return self.batch.gradient_accumulation_steps * self.trained

    @property
    def updates_per_pass(self) -> int:
        return self.images // (self.part * self.batch.gradient_accumulation_steps)

    @property
    def updates(self) -> int:
        """The number of training steps in a round."""
        return self.passes * self.updates_per_pass


def rounds_from(settings: RewardSettings, policy: Policy, batch: BatchSettings, mesh: Mesh) -> Rounds:
    """The rounds that the settings describe.

    Raises:
      ValueError: the samples of a round cannot be divided into training steps, or no step would be trained on.
    """
    part, steps = batch.images_per_part(mesh), random_evaluations(policy.plan)
    sampled = settings.sample_batch_size * (part // batch.train_batch_size)
    trained = int(len(steps) * settings.train_timestep_fraction)
    if not trained:
        raise ValueError(
            f"--train_timestep_fraction {settings.train_timestep_fraction} leaves none of {len(steps)} random steps"
        )
    found = Rounds(sampled, settings.sample_num_batches_per_epoch, steps, trained, batch, part,
                   settings.train_num_inner_epochs)  # fmt: skip
    if found.images % (each := part * batch.gradient_accumulation_steps):
        raise ValueError(
            f"a round samples {found.images} images (--sample_batch_size times --sample_num_batches_per_epoch times "
            f"devices), which cannot be divided into training steps of {each} (--train_batch_size times "
            "--gradient_accumulation_steps times devices)"
        )
    return found


def run_of_rounds(run: RunSettings, rounds: Rounds) -> RunSettings:
    """The settings of a run whose accumulation steps are single evaluations, and whose checkpoints end rounds.

    A checkpoint within a round could not be resumed exactly, because the samples of the round are not in it.

    Raises:
      ValueError: ``scale_lr`` is set.
    """
    if run.optimizer.scale_lr:
        raise ValueError("--scale_lr counts steps of trajectories here, not images: give the --learning_rate itself")
    batch = dataclasses.replace(run.batch, gradient_accumulation_steps=rounds.accumulated)
    every = -(-run.checkpointing_steps // rounds.updates) * rounds.updates
    if every != run.checkpointing_steps:
        say(f"note: checkpoints are written every {every} steps, at the end of rounds of {rounds.updates}")
    return dataclasses.replace(run, batch=batch, checkpointing_steps=every)


class Rollouts:
    """The batches of DDPO: samples of the current policy and, for a round, the steps of their trajectories.

    Attributes:
      names: the prompts of the batch returned last.
      total: the steps that a round trains on, so that an epoch is a round.
      round_steps: the number of training steps in a round, whose samples are made before the first of them.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        settings: RewardSettings,
        rounds: Rounds,
        prompts: Sequence[str],
        frozen: Params,
        mesh: Mesh,
        seed: int,
    ) -> None:
        self._policy, self._reward, self._settings, self._rounds = policy, reward, settings, rounds
        self._prompts, self._frozen, self._mesh, self._seed = prompts, frozen, mesh, seed
        self._statistics = PromptStatistics(
            settings.per_prompt_stat_tracking_buffer_size, settings.per_prompt_stat_tracking_min_count
        )
        self._before = self._recent()
        self._round = self._update = 0
        self._samples: dict[str, Any] | None = None
        self._trainable: Params | None = None
        self.names: Sequence[str] = ()
        self.total, self.round_steps = rounds.images * rounds.trained * rounds.passes, rounds.updates

        @jax.jit
        def run(trainable: Params, frozen: Params, rows: Any) -> Any:
            rows, params = jax.tree.map(lambda x: x[0], rows), policy.combine(trainable, frozen)
            with jax.sharding.use_abstract_mesh(automatic(mesh).abstract_mesh):  # as the training step does
                found = rollout(policy.method, params, rows, policy.plan, evaluations=policy.evaluations)
            return found.results["images"], found.samples, found.log_probs

        self._run = run

    def follow(self, trainable: Params) -> None:
        """Sample with these parameters from now on; :func:`~diffuse_jax.training.loop.fit` calls it."""
        self._trainable = trainable

    def __next__(self) -> Batch:
        if self._samples is None:
            self._samples = self._collect()
        batch = self._steps(self._samples)
        self._update += 1
        if self._update == self._rounds.updates:
            self._round, self._update, self._samples = self._round + 1, 0, None
            self._before = self._recent()
        return batch

    def get_state(self) -> dict[str, Any]:
        """The round and the step in it, and the recent rewards before the round."""
        return {"round": self._round, "update": self._update, "rewards": self._before}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a position; within a round, the rest of it is trained on new samples."""
        self._round, self._update, self._before = state["round"], state["update"], state["rewards"]
        self._samples = None
        size = self._settings.per_prompt_stat_tracking_buffer_size
        self._statistics.recent = {name: deque(values, size) for name, values in self._before.items()}
        if self._update:
            say("note: the checkpoint is within a round; its remaining steps are trained on new samples")

    def _recent(self) -> dict[str, list[float]]:
        return {name: [*values] for name, values in self._statistics.recent.items()}

    def _collect(self) -> dict[str, Any]:
        """The samples of a round with their rewards and advantages; all processes get all of them."""
        r, found, texts = self._rounds, list[dict[str, Any]](), list[str]()
        rng = np.random.default_rng([self._seed, self._round, 1])
        mine = process_rows(self._mesh, 1, r.sampled)
        for _ in range(r.batches):
            prompts, seeds = chosen(self._prompts, rng, r.sampled)
            rows = self._policy.rows(prompts, seeds)
            placed = to_mesh(jax.tree.map(lambda x: np.asarray(x)[mine], rows), self._mesh, 1)
            arrays = readable(self._run(self._trainable, self._frozen, placed))
            images, samples, log_probs = (np.asarray(x) for x in arrays)
            rewards = values_of(self._reward, images, prompts)
            if jax.process_count() > 1:
                rewards = np.asarray(multihost_utils.broadcast_one_to_all(rewards))
            texts += prompts
            found.append({"rows": rows, "samples": samples, "log_probs": log_probs, "rewards": rewards})
        together = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
        values, tracked = together["rewards"].astype(np.float64), self._settings.per_prompt_stat_tracking
        advantage = self._statistics.advantages(texts, values) if tracked else normalised(values)
        limit = self._settings.train_adv_clip_max
        return together | {"prompts": texts, "advantage": np.clip(advantage, -limit, limit).astype(np.float32)}

    def _steps(self, found: Mapping[str, Any]) -> Batch:
        """This process's rows of a training step: for each part of the samples, one evaluation after another."""
        r = self._rounds
        turn, update = divmod(self._update, r.updates_per_pass)
        rng = np.random.default_rng([self._seed, self._round, 2, turn])
        each = r.part * r.batch.gradient_accumulation_steps
        samples = rng.permutation(r.images)[update * each : (update + 1) * each].reshape(-1, r.part)
        rng = np.random.default_rng([self._seed, self._round, 3, turn, update])
        order = np.stack([rng.permutation(r.steps)[: r.trained] for _ in samples])  # [parts, trained]
        parts, columns = np.divmod(process_rows(self._mesh, r.accumulated, r.part), r.part)
        which = samples[parts // r.trained, columns]
        i = order[parts // r.trained, parts % r.trained]
        self.names = [found["prompts"][k] for k in dict.fromkeys(which.tolist())]
        full = lambda value: np.full(len(which), value, np.float32)
        return {
            "rows": jax.tree.map(lambda x: x[which], found["rows"]),
            "before": found["samples"][which, i],
            "after": found["samples"][which, i + 1],
            "log_prob": found["log_probs"][which, i],
            "advantage": found["advantage"][which],
            "i": i.astype(np.int32),
            "reward_mean": full(found["rewards"].mean()),
            "reward_std": full(found["rewards"].std()),
        }
