"""DPM-Solver++ (2S) for the SDE in sigma, k-diffusion's: Lu et al. 2022 (arXiv 2211.01095), alg. 1, with noise.

All noise of a run comes from one Brownian path for each image (Li et al. 2020, arXiv 2001.01328), so that the same
key with more steps gives the same image, more exactly.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar

import numpy as np

from diffuse_jax.allowed import Range
from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.euler import ancestral_split, exploding_grid
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.schedulers.table import Grid, Row

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverSDEScheduler(Scheduler):
    """Second-order steps with noise along one Brownian path; samples are ``x0 + sigma * eps``.

    A step to the midpoint (the geometric mean of the levels), whose prediction then makes the whole step: two
    evaluations, but one for a step to a clean sample. Each of the two goes to a lower level and then up with noise. The
    key of ``plan.step`` chooses the path; ``noise_sampler_seed``, which does so in PyTorch, is kept for its sake.

    Inpainting noises the known part to the level at the end of the step already at its midpoint, as in diffusers.

    Options of :meth:`plan`: ``s_noise``, a factor of the noise, and ``as_published``; with the latter, inpainting
    noises to the level that the sample has at the midpoint.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    timestep_spacing: str = "linspace"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    noise_sampler_seed: Annotated[int, Range(0, 2**63)] | None = None

    harmless: ClassVar[Mapping[str, str]] = {"noise_sampler_seed": "the key of plan.step chooses the noise"}
    coordinates: ClassVar[str] = "exploding"
    step_options: ClassVar[tuple[str, ...]] = ("s_noise", "as_published")

    def __post_init__(self) -> None:
        super().__post_init__()
        sg.sigma_spacing(self)

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        if self.noise_sampler_seed is not None:
            logger.warning("noise_sampler_seed=%s is not used: the key chooses the noise", self.noise_sampler_seed)
        return exploding_grid(self, n, timesteps, sigmas)

    def evaluations(self, grid: Grid, begin: int, s_noise: float = 1.0, as_published: bool = False) -> Iterator[Row]:
        for i in range(begin, len(grid.timesteps)):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            here, there = e.sigma, float(grid.target[i, 1])
            if there == 0:
                yield e.row(e.x0)
                continue
            middle = float(np.sqrt(here * there))
            sample = _move(e.x, e.x0, s_noise * e.noise, here, middle)
            known = None if as_published else grid.target[i]
            yield e.row(sample, memory=[e.x], interval=sg.path_interval(here, middle), inner=True, known=known)
            e = self.evaluation(float(ns.sigma_to_timestep(np.array(middle), self.sigma_table)), (1.0, middle))
            sample = _move(e.memory[0], e.x0, s_noise * e.noise, here, there)
            yield e.row(sample, interval=sg.path_interval(here, there))


def _move(x: Array, x0: Array, noise: Array, sigma: float, target: float) -> Array:
    """From ``sigma`` towards ``x0``, to below ``target`` and up to it with noise."""
    down, up = ancestral_split(sigma, target)
    return x0 + down / sigma * (x - x0) + up * noise
