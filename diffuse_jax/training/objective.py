"""What a denoising network is trained to predict, and how much each noise level counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.schedulers.base import Scheduler


def target(scheduler: Scheduler, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """What the network should return for ``add_noise(x0, noise, t)``: noise, velocity or the clean sample, ``[B,...]``.

    Raises:
      ValueError: the scheduler's ``prediction_type`` is none of these.
    """
    match scheduler.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return scheduler.velocity(x0, noise, t)
        case "sample":
            return x0
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {scheduler.prediction_type!r}")


def snr_table(scheduler: Scheduler) -> np.ndarray:
    """Signal-to-noise ratio ``alpha_bar / (1 - alpha_bar)`` of every training timestep, float32 ``[T]``."""
    return (scheduler.alpha_bar / (1 - scheduler.alpha_bar)).astype(np.float32)


def min_snr_weight(snr: jax.Array, gamma: float, prediction_type: str) -> jax.Array:
    """Min-SNR-gamma weight of the squared error (Hang et al. 2023, section 3.4): ``min(s, gamma) / s``.

    ``s`` is the ratio itself for noise and sample prediction and ``snr + 1`` for velocity, whose error already weighs
    the clean sample's by ``snr + 1``. Where a schedule ends in pure noise (ratio 0) the weight is 1, its limit.
    """
    s = snr + 1 if prediction_type == "v_prediction" else snr
    return jnp.where(s > gamma, gamma / jnp.maximum(s, 1e-8), 1.0)


def weighted_error(prediction: jax.Array, wanted: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Mean squared error in float32: per sample first, then the mean weighted by ``weight [B]`` (1 if it is None)."""
    error = jnp.square(prediction.astype(jnp.float32) - wanted.astype(jnp.float32))
    per_sample = error.mean(tuple(range(1, error.ndim)))
    return (per_sample if weight is None else per_sample * weight).mean()
