"""The run of a sampler of class indices in NumPy: the table, and the posterior that one row of it gives.

See :mod:`diffuse_jax.schedulers.vq_diffusion` for the chain, :mod:`diffuse_jax.schedulers.categorical` for the device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from diffuse_jax.schedulers.noise_schedule import Array

LEAST = 1e-30
"""Lower bound of probabilities, which keeps their logarithms finite."""


@dataclasses.dataclass(frozen=True)
class CategoricalTable:
    """A run in float64.

    Attributes:
      timesteps: ``[n]``, what the network is given.
      log_abc: ``[n, 3, 3]``, logarithms of (a, b, c) from the beginning to the timestep, from the beginning to the next
        one, and from that to the timestep.
      num_classes: K, the mask not counted; its index is K.
    """

    timesteps: Array
    log_abc: Array
    num_classes: int

    def __len__(self) -> int:
        return len(self.timesteps)


def log_abc(ac: Array, classes: int) -> Array:
    """Logarithms of (a, b, c) ``[n, 3]`` from (a, c) ``[n, 2]``."""
    a, c = ac.T
    return np.log(np.maximum([a, (1 - a - c) / classes, c], LEAST)).T


def log_posterior(row: Any, x: Any, log_p_x0: Any, xp: Any = np) -> Any:
    """Log-probabilities ``[B, L, K + 1]`` of the next sample, the mask last (eq. 5, summed over x0 as in eq. 11).

    Args:
      row: one row of :class:`CategoricalTable`, ``[3, 3]``.
      x: class indices ``[B, L]`` at the timestep, K for the mask.
      log_p_x0: ``[B, L, K]``, log-probabilities of the clean classes.
      xp: ``numpy`` or ``jax.numpy``.
    """
    here, there, between = row[0], row[1], row[2]
    x, classes = x[..., None], log_p_x0.shape[-1]
    same, masked = x == xp.arange(classes).reshape(*[1] * (x.ndim - 1), -1), x == classes

    def log_q(abc: Any) -> Any:
        """log q(x | class) for every class that x may have come from."""
        keeps = xp.where(same, xp.logaddexp(abc[0], abc[1]), abc[1])
        return xp.where(masked, abc[2], keeps)

    weights = log_p_x0 - log_q(here)
    largest = weights.max(-1, keepdims=True)
    total = largest + xp.log(xp.exp(weights - largest).sum(-1, keepdims=True))
    to_class = xp.logaddexp(weights + there[0], total + there[1]) + log_q(between)
    to_mask = xp.where(masked, total + there[2], -xp.inf)
    return xp.concatenate([to_class, to_mask], -1)
