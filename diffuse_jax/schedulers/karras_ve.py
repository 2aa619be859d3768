"""Stochastic sampling with churn, for networks of the variance-exploding SDE: Karras et al. 2022 (arXiv 2206.00364).

Algorithm 2 adds noise *before* each step, up to the level at which the network is then asked. A row of the table adds
noise after its evaluation, so the noise before a step belongs to the last row of the step before, and that before the
first step to the first sample, whose standard deviation it raises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np

from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.continuous import ContinuousScheduler
from diffuse_jax.schedulers.edm import check_sigma_range
from diffuse_jax.schedulers.euler import churned
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Evaluation, Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class KarrasVeScheduler(ContinuousScheduler):
    """Heun steps from raised levels, spaced geometrically (table 1, column "VE"); samples are ``x0 + sigma * eps``.

    The network is conditioned on sigma and sees the unscaled sample. ``s_churn``, ``s_min``, ``s_max`` and ``s_noise``
    are those of alg. 2. As in diffusers, the levels go from ``sigma_max ** 2`` to ``sigma_min ** 2``, the first sample
    has the spread ``sigma_max``, and the network predicts the negative noise (``sigma`` times the score).

    Option of :meth:`plan`: with ``as_published=True`` the levels are the paper's, from ``sigma_max`` to ``sigma_min``,
    and the network predicts the noise.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0
    s_noise: float = 1.007
    s_churn: float = 80.0
    s_min: float = 0.05
    s_max: float = 50.0

    coordinates: ClassVar[str] = "exploding"
    absent: ClassVar[tuple[str, ...]] = (*ContinuousScheduler.absent, "num_train_timesteps", "prediction_type")
    grid_options: ClassVar[tuple[str, ...]] = ("as_published",)
    step_options: ClassVar[tuple[str, ...]] = ("as_published",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sigma_range(self.class_name, self.sigma_min, self.sigma_max)

    @property
    def timestep_range(self) -> tuple[float, float]:
        return min(self.sigma_min, self.sigma_min**2), max(self.sigma_max, self.sigma_max**2)

    def level(self, t: Any, xp: Any = np) -> tuple[Any, Any]:
        return xp.ones_like(t), t

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None, as_published: bool = False) -> Grid:
        power, spread = 1 if as_published else 2, None
        if timesteps is not None:
            sigmas = np.append(timesteps, 0.0)
        elif sigmas is None:
            sigmas = np.append(ns.exponential_sigmas(self.sigma_min**power, self.sigma_max**power, n), 0.0)
            spread = self.sigma_max
        return churned_grid(sigmas, lambda s: s, self.s_churn, self.s_min, self.s_max, self.s_noise, spread)

    def evaluations(self, grid: Grid, begin: int, as_published: bool = False) -> Iterator[Row]:
        means = "epsilon" if as_published else "negative_epsilon"

        def denoiser(sigma: float) -> tuple[Evaluation, Array]:
            e = Evaluation(sigma, (1.0, sigma), means, input_scale=1.0)
            return e, e.x0

        return churned_heun(grid, begin, denoiser, self.s_noise)


def churned_grid(
    sigmas: Array,
    timestep: Callable[[Array], Array],
    s_churn: float,
    low: float,
    high: float,
    s_noise: float,
    spread: float | None = None,
) -> Grid:
    """Steps from the raised level of each of ``sigmas`` to the next of them; ``timestep`` is that of a sigma.

    The first sample, before its level is raised, has the standard deviation ``spread``; None is that of its level.
    """
    n = len(sigmas) - 1
    raised = np.array([churned(sigma, s_churn / n, low, high) for sigma in sigmas[:-1]])
    source, target = sg.with_alpha(raised, "exploding"), sg.with_alpha(sigmas[1:], "exploding")
    scale = float(np.hypot(sigmas[0] if spread is None else spread, s_noise * added(sigmas[0], raised[0])))
    return Grid(timestep(sigmas[:-1]), source, target, scale)


def added(sigma: float, raised: float) -> float:
    """Standard deviation of the noise that takes a sample from one level up to another."""
    return float(np.sqrt(raised**2 - sigma**2))


def churned_heun(
    grid: Grid, begin: int, denoiser: Callable[[float], tuple[Evaluation, Array]], s_noise: float
) -> Iterator[Row]:
    """Alg. 2, lines 7 to 13 and then lines 4 to 6 of the next step.

    Args:
      grid: from :func:`churned_grid`.
      begin: the first step to run.
      denoiser: gives the evaluation at a sigma and D(x; sigma) on its unit vectors.
      s_noise: factor of the noise.
    """
    raised, targets = grid.source[:, 1], grid.target[:, 1]
    for i in range(begin, len(raised)):
        here, there = float(raised[i]), float(targets[i])
        e, denoised = denoiser(here)
        slope = (e.x - denoised) / here
        if there == 0:
            yield e.row(denoised)
            continue
        yield e.row(e.x + (there - here) * slope, memory=[e.x, slope], inner=True)
        e, denoised = denoiser(there)
        start, first = e.memory[:2]
        sample = start + (there - here) * (first + (e.x - denoised) / there) / 2
        up = added(there, raised[i + 1]) if i + 1 < len(raised) else 0.0
        yield e.row(sample + s_noise * up * e.noise)
