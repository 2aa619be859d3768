"""DPM-Solver-2 in sigma, as k-diffusion has it: Karras et al. 2022 (arXiv 2206.00364), alg. 2, with a midpoint.

The midpoint of a step is the geometric mean of its levels, that of DPM-Solver-2 (Lu et al. 2022, arXiv 2206.00927,
alg. 1, with r = 1/2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.euler import ancestral_split, exploding_grid
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.schedulers.table import Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class KDPM2DiscreteScheduler(Scheduler):
    """An Euler step to the midpoint, whose slope then makes the whole step.

    Two evaluations per step, but one for a step to a clean sample. Samples are ``x0 + sigma * eps``. Inpainting noises
    the known part to the level at the end of the step already at its midpoint, as in diffusers; option of :meth:`plan`:
    with ``as_published=True``, to the level that the sample has there.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    timestep_spacing: str = "linspace"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False

    coordinates: ClassVar[str] = "exploding"
    step_options: ClassVar[tuple[str, ...]] = ("as_published",)

    def __post_init__(self) -> None:
        super().__post_init__()
        sg.sigma_spacing(self)

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        grid = exploding_grid(self, n, timesteps, sigmas)
        # Networks were first sampled with whole timesteps at Karras' levels, and at those only.
        return dataclasses.replace(grid, timesteps=np.round(grid.timesteps)) if self.use_karras_sigmas else grid

    def evaluations(self, grid: Grid, begin: int, as_published: bool = False) -> Iterator[Row]:
        for i in range(begin, len(grid.timesteps)):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            down, up = self._split(e.sigma, grid.target[i, 1])
            slope = (e.x - e.x0) / e.sigma
            if down == 0:
                yield e.row(e.x - e.sigma * slope)
                continue
            here, middle = e.sigma, np.sqrt(e.sigma * down)
            known = None if as_published else grid.target[i]
            yield e.row(e.x + (middle - here) * slope, memory=[e.x], inner=True, known=known)
            t = float(ns.sigma_to_timestep(middle, self.sigma_table))
            e = self.evaluation(t, (1.0, middle))
            yield e.row(e.memory[0] + (down - here) * (e.x - e.x0) / middle + up * e.noise)

    def _split(self, sigma: float, target: float) -> tuple[float, float]:
        """Where the deterministic part of a step ends, and how much fresh noise follows."""
        return target, 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """Steps to a lower level than the next one, then fresh noise up to it."""

    def _split(self, sigma: float, target: float) -> tuple[float, float]:
        return ancestral_split(sigma, target)
