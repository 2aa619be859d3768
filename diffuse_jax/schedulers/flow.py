"""Noise levels of flow matching: Lipman et al. 2023 (arXiv 2210.02747) and Liu et al. 2023 (arXiv 2209.03003).

Samples lie on lines ``x = (1 - sigma) * x0 + sigma * eps``; the network's time is ``sigma * num_train_timesteps``.
Larger images need more steps at high noise, so levels are *shifted* (Esser et al. 2024, arXiv 2403.03206,
section 5.3.2), by a fixed factor or by one that depends on the size.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from diffuse_jax.schedulers.noise_schedule import Array

SHIFT_TYPES = ("exponential", "linear")
"""How ``mu`` of dynamic shifting is read: the factor is ``exp(mu)`` or ``mu`` itself."""


def shift(sigmas: Any, factor: float, xp: Any = np) -> Any:
    """Levels moved towards noise by ``factor`` (Esser et al. 2024, eq. 23, with ``factor = sqrt(m / n)``), with ``xp``
    NumPy or ``jax.numpy``."""
    moved = factor * sigmas / (1 + (factor - 1) * sigmas)
    return xp.where(sigmas == 1, 1.0, moved)  # pure noise stays pure noise to the last digit


def shift_factor(
    name: str, static: float, *, dynamic: bool, kind: str = "exponential", mu: float | None = None
) -> float:
    """The factor of :func:`shift` for a configuration and an image size.

    Args:
      name: the scheduler, for messages.
      static: the factor without dynamic shifting (``shift`` or ``flow_shift``).
      dynamic: ``use_dynamic_shifting``, the factor then comes from ``mu``.
      kind: ``time_shift_type``, one of :data:`SHIFT_TYPES`.
      mu: what :func:`mu_of_length` gives, for dynamic shifting only.

    Raises:
      ValueError: ``mu`` is missing or not expected, or the factor is not positive.
    """
    if dynamic and mu is None:
        raise ValueError(
            f"{name} has use_dynamic_shifting=True and needs plan(..., mu=); schedulers.flow.mu_of_length gives it from"
            " the number of tokens (or use .replace(use_dynamic_shifting=False))"
        )
    if not dynamic and mu is not None:
        raise ValueError(f"{name} got mu={mu:g} but has use_dynamic_shifting=False; set it to True or leave mu out")
    factor = static if mu is None else math.exp(mu) if kind == "exponential" else mu
    if not 0 < factor < math.inf:
        given = f"shift of {static:g}" if mu is None else f"mu={mu:g} with time_shift_type={kind!r}"
        raise ValueError(f"{name}: levels are shifted by a positive factor, a {given} means {factor:g}")
    return float(factor)


def mu_of_length(
    length: float,
    *,
    base_length: int = 256,
    max_length: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """``mu`` of dynamic shifting for an image of ``length`` tokens: linear through the two given points."""
    return base_shift + (max_shift - base_shift) * (length - base_length) / (max_length - base_length)


def stretch_to_terminal(sigmas: Array, terminal: float) -> Array:
    """Scale the distances to pure noise so that the last level becomes ``terminal`` (LTX-Video, arXiv 2501.00103)."""
    if sigmas[-1] == 1:  # a single step, from pure noise: there is no distance to scale
        return sigmas
    return np.asarray(1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - terminal)))


def training_sigmas(train_steps: int, factor: float = 1.0) -> Array:
    """Shifted levels of the training steps, ascending from near 0 to 1, ``[train_steps]``."""
    return shift(np.arange(1, train_steps + 1) / train_steps, factor)


def training_levels(train_steps: int) -> Array:
    """(alpha, sigma) at the timesteps ``0, 1, ..., train_steps``, ``[train_steps + 1, 2]``."""
    sigmas = np.arange(train_steps + 1) / train_steps
    return np.stack([1 - sigmas, sigmas], -1)
