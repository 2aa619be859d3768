"""Multistep sampling of consistency models: Song et al. 2023 (arXiv 2303.01469), alg. 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from diffuse_jax.allowed import Positive
from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.continuous import ContinuousScheduler
from diffuse_jax.schedulers.edm import check_sigma_range
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Evaluation, Grid, Level, Row


class BoundedEvaluation(Evaluation):
    """An evaluation whose clean sample is the consistency function, the sample itself at ``sigma_min``."""

    def __init__(self, timestep: float, level: Level, sigma_data: float, sigma_min: float, *, corrected: bool) -> None:
        above, norm = level[1] - sigma_min, np.hypot(level[1], sigma_data)
        # Appendix C: the preconditioning of EDM, shifted to have the boundary condition at sigma_min.
        self.c_skip, self.c_out = sigma_data**2 / (above**2 + sigma_data**2), above * sigma_data / norm
        super().__init__(timestep, level, "edm", corrected=corrected, sigma_data=sigma_data)

    def x0_of(self, x: Array, output: Array) -> Array:
        return self.c_skip * x + self.c_out * output


@dataclasses.dataclass(frozen=True, kw_only=True)
class CMStochasticIterativeScheduler(ContinuousScheduler):
    """Jump to the clean sample, then noise it to the next level; samples are ``x0 + sigma * eps``.

    The levels are chosen from the ``num_train_timesteps`` training levels at equal strides. Explicit timesteps are
    descending indices into that list, where 0 is ``sigma_max``. The network gets ``250 * log(sigma)`` as its timestep.
    """

    num_train_timesteps: int = 40
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5  # type: ignore[misc]  # a class attribute of others
    s_noise: float = 1.0
    rho: Positive = 7.0
    clip_denoised: bool = True

    coordinates: ClassVar[str] = "exploding"
    limits_steps: ClassVar[bool] = True
    absent: ClassVar[tuple[str, ...]] = (*ContinuousScheduler.absent, "prediction_type")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sigma_range(self.class_name, self.sigma_min, self.sigma_max)

    @property
    def timestep_range(self) -> tuple[float, float]:
        return 250 * float(np.log(self.sigma_min)), 250 * float(np.log(self.sigma_max))

    @property
    def explicit_range(self) -> tuple[float, float]:
        return 0.0, self.num_train_timesteps - 1.0

    def level(self, t: Any, xp: Any = np) -> tuple[Any, Any]:
        return xp.ones_like(t), xp.exp(t / 250)

    def _correction(self) -> dict[str, Any]:
        return {"clip": 1.0} if self.clip_denoised else {}

    def evaluation(self, timestep: float, level: Level) -> Evaluation:
        return BoundedEvaluation(timestep, level, self.sigma_data, self.sigma_min, corrected=self.corrects_x0)

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        if sigmas is None:
            train = self.num_train_timesteps
            places = np.arange(n, dtype=np.float64)[::-1] * (train // n) if timesteps is None else timesteps
            ramp = ns.training_ramp(places, train)
            sigmas = np.append(ns.karras_ramp(ramp, self.sigma_min, self.sigma_max, self.rho), self.sigma_min)
        levels = sg.with_alpha(sigmas, self.coordinates)
        return Grid(250 * np.log(sigmas[:-1]), levels[:-1], levels[1:], float(sigmas[0]))

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        for t, source, (_, sigma) in zip(grid.timesteps[begin:], grid.source[begin:], grid.target[begin:], strict=True):
            e = self.evaluation(t, source)
            up = np.sqrt(np.clip(sigma, self.sigma_min, self.sigma_max) ** 2 - self.sigma_min**2)
            yield e.row(e.x0 + self.s_noise * up * e.noise)
