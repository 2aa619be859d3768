"""DPM-Solver++ run backwards, from an image to the noise that it comes from: for editing as in DiffEdit (2210.11427).

The equations are those of :mod:`dpm_solver` (Lu et al. 2022, arXiv 2211.01095); lambda falls along the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from diffuse_jax.schedulers.dpm_solver import DPMSolver, multistep
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverMultistepInverseScheduler(DPMSolver):
    """Exponential multistep integrator of order 1 to 3 from an image to noise.

    The image is taken for a sample at the level of the first timestep: ``plan.resume(image)`` begins a run, and
    ``state.sample`` at its end is the noise. ``strength`` runs only the first steps.
    """

    euler_at_final: bool = False

    ascends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.algorithm_type.startswith("sde-"):
            raise ValueError(
                f"algorithm_type={self.algorithm_type!r} draws noise as it goes towards an image and cannot run"
                f" backwards; use {self.algorithm_type.removeprefix('sde-')!r}"
            )

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None, **options: Any) -> Grid:
        grid = super().grid(n, timesteps=timesteps, sigmas=sigmas, **options)
        return dataclasses.replace(grid, final=grid.target[-1])

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        return multistep(self, grid, begin, euler_at_final=self.euler_at_final)
