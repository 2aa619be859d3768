"""DRaFT: the gradient of a reward, through the decoder and the last steps of sampling.

Clark et al. 2023, 'Directly Fine-Tuning Diffusion Models on Differentiable Rewards' (arXiv 2309.17400); AlignProp
(Prabhudesai et al. 2023, arXiv 2310.03739) is the same for a random number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffuse_jax.models import Params
from diffuse_jax.pipelines import sample
from diffuse_jax.training.batches import Batch, IndexedBatches
from diffuse_jax.training.data.loader import process_rows
from diffuse_jax.training.policy import Policy, chosen
from diffuse_jax.training.rewards import Reward
from diffuse_jax.training.settings import BatchSettings
from diffuse_jax.training.state import Metrics

REWARD = "reward"
"""The name of the reward's arrays among the frozen parameters."""


def draft_loss(
    policy: Policy, reward: Reward, last: int, trainable: Params, frozen: Params, batch: Any, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """The negative mean reward of new images, differentiable through the last ``last`` steps (section 4.2, DRaFT-K).

    ``batch`` has ``rows`` of a request, and ``prompts`` if the reward encodes them.
    """
    params = policy.combine(trainable, frozen)
    images = sample(
        policy.method, params, batch["rows"], policy.plan,
        evaluations=policy.evaluations, gradient_evaluations=min(last, policy.evaluations),
    )["images"]  # fmt: skip
    values = reward.function(frozen[REWARD], images, batch.get("prompts")).astype(jnp.float32)
    return -values.mean(), {"reward_mean": values.mean(), "reward_std": values.std()}


class DraftBatches(IndexedBatches):
    """Random prompts and seeds for every training step, as a function of its index.

    Attributes:
      total: the images of a training step, so that an epoch is one.
    """

    def __init__(
        self, policy: Policy, reward: Reward, prompts: Sequence[str], batch: BatchSettings, mesh: Mesh, seed: int
    ) -> None:
        self.total = batch.images_per_step(mesh)
        mine = process_rows(mesh, batch.gradient_accumulation_steps, batch.images_per_part(mesh))

        def draws(n: int) -> tuple[list[str], list[int]]:
            texts, seeds = chosen(prompts, np.random.default_rng([seed, n]), self.total)
            return [texts[k] for k in mine], [seeds[k] for k in mine]

        def make(n: int) -> Batch:
            texts, seeds = draws(n)
            encoded = {} if reward.encode is None else {"prompts": reward.encode(texts)}
            return {"rows": policy.rows(texts, seeds), **encoded}

        super().__init__(make, lambda n: draws(n)[0])
