"""Rounds of DDPO on a policy that costs nothing to compile: what is trained on, and where a run continues."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffuse_jax import DDIMScheduler
from diffuse_jax.pipelines import Method, Part
from diffuse_jax.pipelines.method import Params, Rows, Step
from diffuse_jax.pipelines.parts import FromNoise, Raw
from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.ddpo import Rollouts, ddpo_loss, rounds_from
from diffuse_jax.training.policy import Policy
from diffuse_jax.training.rewards import Reward
from diffuse_jax.training.settings import BatchSettings, RewardSettings
from diffuse_jax.training.start import next_batch
from diffuse_jax.training.state import init_state, make_step

N, PROMPTS = 4, ["a", "b", "c"]
WEIGHTS = {"w": jnp.array([0.5, -1.0, 2.0, 0.1]), "b": jnp.array([0.1, 0.0, 0.5, -0.2])}


@dataclasses.dataclass(frozen=True)
class Curve(Part):
    """A denoiser of four numbers."""

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        return jnp.tanh(x * params["w"].reshape(1, -1) + params["b"].reshape(1, -1))


def rows(prompts: Sequence[str], seeds: Sequence[int]) -> Any:
    names = np.array([PROMPTS.index(prompt) for prompt in prompts], np.int32)
    return {"seed": np.array(seeds, np.uint32), "index": np.zeros(len(seeds), np.uint32), "prompt": names}


DDIM = DDIMScheduler(prediction_type="sample", clip_sample=False, steps_offset=1)
PLAN = DDIM.plan(N, eta=1.0)
"""The last step draws nothing."""
POLICY = Policy(Method(Curve(), FromNoise(), Raw(), (4,)), PLAN, N, rows, lambda trainable, frozen: trainable)
FIRST = Reward("first", lambda params, images, prompts: images[:, 0] + np.array([len(p) for p in prompts]))


def rollouts(devices: int = 1, **options: Any) -> tuple[Rollouts, RewardSettings]:
    sizes = {"sample_batch_size": 8 // devices, "sample_num_batches_per_epoch": 2, "train_num_inner_epochs": 2}
    settings = RewardSettings(reward="m:f", sample_num_steps=N, **sizes | options)
    mesh = make_mesh(devices=jax.devices()[:devices])
    batch = BatchSettings(train_batch_size=4 // devices, gradient_accumulation_steps=2)
    made = Rollouts(POLICY, FIRST, settings, rounds_from(settings, POLICY, batch, mesh), PROMPTS, {}, mesh, seed=3)
    made.follow(WEIGHTS)
    return made, settings


def test_every_random_step_is_trained_on_once_in_a_pass() -> None:
    """16 images and 3 random steps, in two training steps of two parts of four images."""
    made, _ = rollouts()
    batches = [next(made) for _ in range(4)]
    for one in (batches[:2], batches[2:]):
        visits = [(int(s), int(i)) for b in one for s, i in zip(b["rows"]["seed"], b["i"], strict=True)]
        assert len(visits) == len({*visits}) == 16 * 3
        assert {i for _, i in visits} == {0, 1, 2}
    for b in batches:
        assert np.all(b["i"].reshape(-1, 4) == b["i"].reshape(-1, 4)[:, :1]), "a part is one evaluation"
        assert {*made.names} <= {*PROMPTS}
    order = [b["rows"]["seed"] for b in batches]
    assert not np.array_equal(order[0], order[2])
    assert made.get_state() == {"round": 1, "update": 0, "rewards": {}}
    assert not {*next(made)["rows"]["seed"].tolist()} & {int(s) for seeds in order for s in seeds}, "a new round"


def test_a_share_of_the_steps() -> None:
    made, _ = rollouts(train_timestep_fraction=0.7)
    b = next(made)
    assert [len({*part}) for part in b["i"].reshape(2, -1)] == [2, 2]


def test_rows_belong_together() -> None:
    """The ratio of every row is 1 for the policy that sampled it; its advantage is that of its image."""
    made, settings = rollouts(train_adv_clip_max=1.0)
    batches = [next(made) for _ in range(2)]
    for b in batches:
        for part in range(6):
            one = jax.tree.map(lambda x, p=part: x[4 * p : 4 * p + 4], b)
            loss, metrics = ddpo_loss(POLICY, settings, WEIGHTS, {}, one, jax.random.key(0))
            assert float(loss) == pytest.approx(-one["advantage"].mean(), rel=1e-4, abs=1e-5)
            assert float(metrics["approx_kl"]) < 1e-9
    flat = {name: np.concatenate([b[name] for b in batches]) for name in ("advantage", "i", "after", "reward_mean")}
    seeds = np.concatenate([b["rows"]["seed"] for b in batches])
    each = {int(seed): advantage for seed, advantage in zip(seeds, flat["advantage"], strict=True)}
    assert all(each[int(seed)] == a for seed, a in zip(seeds, flat["advantage"], strict=True))
    assert max(np.abs([*each.values()])) == 1.0
    assert len({*flat["reward_mean"].tolist()}) == 1


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("tracked", [False, True])
def test_a_run_continues_where_it_was(tracked: bool) -> None:
    """After a round with the same samples and statistics; within a round at the same step, on new samples."""
    options = {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 2} if tracked else {}
    whole, _ = rollouts(**options)
    states, batches = [], []
    for _ in range(8):
        states.append(whole.get_state())
        batches.append(next(whole))
    again, _ = rollouts(**options)
    again.set_state(states[4])
    for wanted in batches[4:]:
        same(next(again), wanted)
    again.set_state(states[6])  # the policy is the same here, and so are the samples
    same(next(again), batches[6])
    assert bool(states[4]["rewards"]) == tracked


def test_several_devices_sample_the_same() -> None:
    one, several = rollouts(1)[0], rollouts(4)[0]
    for _ in range(2):
        a, b = next(one), next(several)
        same(a["rows"], b["rows"])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def test_the_reward_rises() -> None:
    """Six rounds of 32 images; the reward is at most 2."""
    sizes = {"sample_batch_size": 32, "sample_num_batches_per_epoch": 1, "train_num_inner_epochs": 2}
    made, settings = rollouts(**sizes, train_clip_range=0.1)
    optimizer, mesh = optax.adam(0.1), make_mesh(devices=jax.devices()[:1])
    state, step = init_state(WEIGHTS, optimizer, False), None
    rewards: list[float] = []
    for _ in range(6 * 8):
        batch = next_batch(made, state.params, mesh, 6)
        step = step or make_step(functools.partial(ddpo_loss, POLICY, settings), optimizer, seed=0)
        state, metrics = step(state, {}, batch)
        rewards.append(float(metrics["reward_mean"]))
    assert rewards[-1] > rewards[0] + 0.3, rewards[::8]
