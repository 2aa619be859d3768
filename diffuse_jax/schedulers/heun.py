"""Heun's method on the probability-flow ODE in sigma: Karras et al. 2022 (arXiv 2206.00364), alg. 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.euler import exploding_grid
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.schedulers.table import Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeunDiscreteScheduler(Scheduler):
    """An Euler step, then the same step again with the mean of the slopes at its two ends.

    Two evaluations per step, but one for a step to a clean sample, where there is no slope. Samples are
    ``x0 + sigma * eps``.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    timestep_spacing: str = "linspace"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    clip_sample: bool = False
    clip_sample_range: float = 1.0

    coordinates: ClassVar[str] = "exploding"
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"beta_schedule": (*ns.BETA_SCHEDULES, "exp")}

    def __post_init__(self) -> None:
        super().__post_init__()
        sg.sigma_spacing(self)

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        return exploding_grid(self, n, timesteps, sigmas)

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        n = len(grid.timesteps)
        for i in range(begin, n):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            h = grid.target[i, 1] - e.sigma
            slope = (e.x - e.x0) / e.sigma
            yield e.row(e.x + h * slope, memory=[e.x, slope], inner=grid.target[i, 1] > 0)
            if grid.target[i, 1] == 0:
                continue
            t = grid.timesteps[i + 1] if i + 1 < n else float(ns.sigma_to_timestep(grid.target[i, 1], self.sigma_table))
            e = self.evaluation(t, grid.target[i])
            start, first = e.memory[:2]
            yield e.row(start + h * (first + (e.x - e.x0) / e.sigma) / 2)
