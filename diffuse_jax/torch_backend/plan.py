"""The torch twin of a plan's step: the same rows, applied to tensors.

Tensors are channel-last float32 like the arrays of :class:`diffuse_jax.schedulers.plan.Plan`, whose leaves are NumPy
arrays here. Noise is drawn by JAX from the same keys and handed over.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
import torch

from diffuse_jax.schedulers.plan import Plan
from diffuse_jax.schedulers.table import MEMORY


class State(NamedTuple):
    """What one evaluation hands to the next: sample and remembered tensors, all float32 ``[B, ...]``."""

    sample: torch.Tensor
    memory: tuple[torch.Tensor, ...]


def on_host(plan: Plan) -> Plan:
    """The plan with NumPy leaves."""
    return jax.tree.map(np.asarray, plan)


def first_state(plan: Plan, noise: torch.Tensor) -> State:
    """Scaled ``noise [B, ...]`` and an empty memory."""
    sample = float(plan.init_scale) * noise
    return State(sample, (torch.zeros_like(sample),) * MEMORY)


def model_input(plan: Plan, state: State, i: int) -> torch.Tensor:
    """What the network sees at evaluation ``i``."""
    return float(plan.input_scale[i]) * state.sample


def step(plan: Plan, state: State, i: int, model_output: torch.Tensor, noise: torch.Tensor) -> State:
    """The state after evaluation ``i``.

    Args:
      plan: with NumPy leaves.
      state: the state before it.
      i: index of the evaluation.
      model_output: ``[B, ..., C]``, or ``[B, ..., 2 C]`` with a variance in the second half.
      noise: what ``plan.draw(i, shape, key)`` gives.
    """
    sample = state.sample
    output, variance = split(model_output.float(), sample.shape[-1])
    if variance is not None and plan.learned_variance == "learned":
        noise = noise * variance.clamp(min=0).sqrt()
    elif variance is not None and plan.learned_variance:
        low, high = map(float, plan.log_variance[i])
        noise = noise * torch.exp(0.5 * (low + 0.5 * (variance + 1) * (high - low)))
    stack = (sample, clean(plan, sample, i, output), output, *state.memory, noise)
    new = [
        sum((float(c) * x for c, x in zip(row, stack, strict=True)), torch.zeros_like(sample)) for row in plan.rows[i]
    ]
    return State(new[0], tuple(new[1:]))


def split(output: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The prediction, and what else the network returned in as many channels again."""
    if output.shape[-1] == channels:
        return output, None
    mean, variance = output.split(channels, -1)
    return mean, variance


def clean(plan: Plan, sample: torch.Tensor, i: int, output: torch.Tensor) -> torch.Tensor:
    """The clean sample that the output means, clipped or thresholded as the plan says."""
    of_sample, of_output = map(float, plan.to_x0[i])
    x0 = of_sample * sample + of_output * output
    if not plan.thresholding:
        return x0.clamp(-float(plan.clip), float(plan.clip))
    ratio, largest = map(float, plan.threshold)
    s = torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(1.0, largest)
    s = s.reshape(-1, *[1] * (x0.ndim - 1))
    return torch.minimum(torch.maximum(x0, -s), s) / s
