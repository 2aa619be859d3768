"""Sampling as a policy: trajectories of ancestral samplers with the log-density of every step, for policy gradients.

Each evaluation of the network is an action, the draw of the next sample (Black et al. 2023, arXiv 2305.13301, section
4.2); its density is that of the sampler's own transition, :meth:`Plan.log_prob
<diffuse_jax.schedulers.Plan.log_prob>`. Guidance and everything else in the method is part of the policy.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.pipelines.method import (
    PLAIN_STEP,
    Kept,
    Method,
    Params,
    PlainStep,
    Rows,
    Step,
    advance,
    begin,
    check_evaluations,
    check_rows,
    finish,
)
from diffuse_jax.schedulers.plan import Plan, State
from diffuse_jax.schedulers.table import MEMORY
from diffuse_jax.sharding import on_automatic_axes

LOG_PROB = "log_prob"


class Rollout(NamedTuple):
    """Sampled trajectories.

    Attributes:
      results: what ``method.decode`` returns.
      samples: the sample before every evaluation and after the last one, float32 ``[B,N+1, ...]``.
      log_probs: the log-density of every step, float32 ``[B,N]``; 0 where the sampler draws nothing.
    """

    results: dict[str, Any]
    samples: jax.Array
    log_probs: jax.Array


@dataclasses.dataclass(frozen=True)
class RecordedStep(PlainStep):
    """The plain step, which also keeps the log-density of what it drew."""

    @property
    def keeps(self) -> bool:
        return True

    def __call__(self, denoiser: Any, params: Params, rows: Rows, state: State, step: Step, keys: jax.Array) -> State:
        outputs: list[jax.Array] = []

        def noted(*args: Any) -> jax.Array:
            outputs.append(denoiser(*args))
            return outputs[-1]

        after = super().__call__(noted, params, rows, state, step, keys)
        step.kept.write(LOG_PROB, step.plan.log_prob(state, step.i, outputs[-1].astype(jnp.float32), after.sample))
        return after


def rollout(method: Method, params: Params, rows: Rows, plan: Plan, *, evaluations: int) -> Rollout:
    """:func:`~diffuse_jax.sample` that also returns the trajectories and the log-densities of their steps.

    Args:
      method, params, rows, plan: as for ``sample``.
      evaluations: the number of network evaluations as a static value, equal to the plan's.

    Raises:
      ValueError: the steps of the plan or of the method are not those of a policy, see :func:`check_policy`; or as for
        ``sample``.
    """
    check_rows(method, rows)
    check_evaluations(plan, evaluations)
    check_policy(method, plan)
    recorded = dataclasses.replace(method, advance=RecordedStep())

    def run(params: Params, rows: Rows, plan: Plan) -> Rollout:
        rows, start = begin(recorded, params, rows, plan)

        def one(state: State, i: jax.Array) -> tuple[State, tuple[jax.Array, jax.Array]]:
            after = advance(recorded, params, rows, plan, state, i)
            return after, (after.sample, after.kept[LOG_PROB])

        state, (samples, log_probs) = jax.lax.scan(one, start, jnp.arange(evaluations, dtype=jnp.int32))
        samples = jnp.concatenate([start.sample[None], samples])
        by_image = lambda x: jnp.moveaxis(x, 1, 0)
        return Rollout(finish(recorded, params, rows, state), by_image(samples), by_image(log_probs))

    return on_automatic_axes(run, (params, rows, plan), batch=rows)


def step_log_prob(
    method: Method, params: Params, rows: Rows, plan: Plan, i: Any, before: jax.Array, after: jax.Array
) -> jax.Array:
    """The log-density of one step of a trajectory under the parameters, float32 ``[B]``; differentiable.

    With the parameters that sampled the trajectory, it is that of :func:`rollout`.

    Args:
      method, params, rows, plan: as for :func:`rollout`.
      i: the index of the evaluation, a scalar.
      before, after: the samples around it, ``[B, ...]``.
    """
    rows = method.prepare(params, rows)
    state = State(before, (jnp.zeros_like(before),) * MEMORY)
    step = Step(i, plan.timestep(i), plan, Kept())
    output = method.denoiser(params, rows, plan.model_input(state, i), step)
    return plan.log_prob(state, i, output.astype(jnp.float32), after)


def random_evaluations(plan: Plan) -> np.ndarray:
    """The indices of the evaluations at which the sampler draws noise, in order; the plan must not be traced."""
    rows = np.asarray(plan.rows)[: int(plan.num_evaluations)]
    return np.flatnonzero(rows[:, 0, -1])


def check_policy(method: Method, plan: Plan) -> None:
    """Check that steps have densities that depend on the sample alone; of a traced plan, only the method is checked.

    Raises:
      ValueError: the sampler draws nothing, combines earlier outputs, or correlates its noise; or the method does more
        in a step than the sampler's step, or keeps values between steps.
    """
    advice = "use an ancestral sampler: DDIM with eta above 0, DDPM, Euler ancestral or LCM"
    if method.advance != PLAIN_STEP or any(part.keeps for part in method.parts):
        raise ValueError(f"the density of {type(method.advance).__name__}'s steps is not known; only of plain sampling")
    if isinstance(plan.num_evaluations, jax.core.Tracer):
        return
    count = int(plan.num_evaluations)
    rows, interval = np.asarray(plan.rows)[:count], np.asarray(plan.interval)[:count]
    if not len(random_evaluations(plan)):
        raise ValueError(f"the sampler draws no noise, so its steps have no density; {advice}")
    if np.any(rows[:, 0, 3:-1]):
        raise ValueError(f"the sampler's steps combine earlier outputs; {advice}")
    if np.any(interval[:, 0] < interval[:, 1]):
        raise ValueError(f"the noise of the sampler's steps is one Brownian path; {advice}")
