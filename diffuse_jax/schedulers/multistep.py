"""What the exponential integrators DPM-Solver and UniPC share: their grid and the form of one step.

Both solve the diffusion ODE exactly but for the network's output, in ``lambda = log(alpha / sigma)``. A step of length
``h`` in lambda is ``x' = p * x - q * (expm1(u) * m0 + ...)``, where the output ``m0`` is the clean sample and
``(p, q, u) = (sigma'/sigma, alpha', -h)``, or the noise and ``(p, q, u) = (alpha'/alpha, sigma', h)``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.base import Scheduler
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Grid


class Step(NamedTuple):
    """Coefficients of one exponential-integrator step; see the module."""

    p: float
    q: float
    u: float


def log_snr_half(level: Array) -> float:
    """``lambda = log(alpha / sigma)`` of an (alpha, sigma) pair; infinite for a clean sample."""
    return float(np.inf if level[1] == 0 else np.log(level[0] / level[1]))


def exponential_step(source: Array, target: Array, *, data: bool) -> Step:
    """The step between two levels, for a network output read as clean data or as noise."""
    h = log_snr_half(target) - log_snr_half(source)
    if data:
        return Step(target[1] / source[1], target[0], -h)
    return Step(target[0] / source[0], target[1], h)


def preserving_grid(
    scheduler: Scheduler, n: int, timesteps: Array | None, sigmas: Array | None, last: int | None = None
) -> Grid:
    """Levels between training timesteps.

    Args:
      scheduler: its training schedule, spacing flags and ``final_sigmas_type`` are used.
      n: number of steps.
      timesteps, sigmas: explicit ones (one of them at most).
      last: use training timesteps below this one only.
    """
    table = scheduler.sigma_table
    final = table[0] if scheduler.final_sigmas_type == "sigma_min" else 0.0  # type: ignore[attr-defined]
    if sigmas is not None:
        sg.check_no_spacing(scheduler, "sigmas")
        t, s = ns.sigma_to_timestep(sigmas[:-1], table), sigmas
    elif sg.sigma_spacing(scheduler):
        if timesteps is not None:
            sg.check_no_spacing(scheduler, "timesteps")
        s = sg.respaced(scheduler, table[0], table[-1], n)
        t = scheduler.whole_timesteps(ns.sigma_to_timestep(s, table))  # type: ignore[attr-defined]
        s = np.append(s, final)
    else:
        t = _spaced(scheduler, n, last or scheduler.num_train_timesteps) if timesteps is None else timesteps
        s = np.append(sg.at_timesteps(table, t), final)
    levels = sg.with_alpha(s, scheduler.coordinates)
    return Grid(t, levels[:-1], levels[1:])


def _spaced(scheduler: Scheduler, n: int, last: int) -> Array:
    """``n`` timesteps of a spacing of ``n + 1`` whose smallest is left out (that step goes to the final level)."""
    spacing, train = scheduler.timestep_spacing, scheduler.num_train_timesteps
    if spacing == "linspace":
        t = np.round(np.linspace(0, last - 1, n + 1))[:0:-1]
    elif spacing == "leading":
        t = (np.arange(n, 0, -1) * (last // (n + 1)) + scheduler.steps_offset).astype(np.float64)
    else:
        t = np.round(np.arange(last, 0, -train / n))[:n] - 1
    if np.any(np.diff(t) >= 0) or t[0] >= train or t[-1] < 0:
        raise ValueError(
            f"{scheduler.class_name} cannot place {n} steps on {last} timesteps with spacing {spacing!r} and"
            f" steps_offset={scheduler.steps_offset}; use fewer steps"
        )
    return t
