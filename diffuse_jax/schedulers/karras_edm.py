"""Heun's method with churn for EDM networks: Karras et al. 2022 (arXiv 2206.00364), alg. 2 and table 1, "Ours"."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import numpy as np

from diffuse_jax.allowed import INFINITY, Positive, Range
from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers.continuous import ContinuousScheduler
from diffuse_jax.schedulers.edm import check_sigma_range
from diffuse_jax.schedulers.karras_ve import churned_grid, churned_heun
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Evaluation, Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class KarrasEDMScheduler(ContinuousScheduler):
    """The sampler of EDM, two evaluations per step; also for consistency models' teachers.

    The network's output is preconditioned: ``prediction_type`` is ``sample`` for the network F of the paper; what
    ``epsilon`` and ``v_prediction`` give is read as a clean sample and then taken for F. With ``clip_sample`` it is
    clipped before that. The network's time is ``log(sigma) / 4`` (``precondition_type="edm"``), ``250 * log(sigma)``
    (``"cm_edm"``) or sigma itself. Explicit timesteps are places in the list of ``num_train_timesteps`` levels, 0 being
    ``sigma_max``, in descending order; ``timestep_spacing`` has no influence.
    """

    num_train_timesteps: int = 40
    prediction_type: str = "sample"
    precondition_type: str | None = "edm"
    timestep_spacing: str = "linspace"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5  # type: ignore[misc]  # a class attribute of others
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: Annotated[float, Range(0, INFINITY)] = float("inf")
    s_noise: float = 1.0
    rho: Positive = 7.0
    clip_sample: bool = False
    clip_sample_range: float = 1.0

    coordinates: ClassVar[str] = "exploding"
    limits_steps: ClassVar[bool] = True
    absent: ClassVar[tuple[str, ...]] = tuple(n for n in ContinuousScheduler.absent if n != "timestep_spacing")
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"precondition_type": ("edm", "cm_edm", "none", None)}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sigma_range(self.class_name, self.sigma_min, self.sigma_max)

    @property
    def timestep_range(self) -> tuple[float, float]:
        low, high = self.timestep(np.array([self.sigma_min, self.sigma_max]))
        return float(low), float(high)

    @property
    def explicit_range(self) -> tuple[float, float]:
        return 0.0, self.num_train_timesteps - 1.0

    def timestep(self, sigma: Array) -> Array:
        """The network's noise conditioning ``c_noise`` at these noise levels."""
        return sigma if self._rate is None else np.log(sigma) * self._rate

    def level(self, t: Any, xp: Any = np) -> tuple[Any, Any]:
        return xp.ones_like(t), t if self._rate is None else xp.exp(t / self._rate)

    @property
    def _rate(self) -> float | None:
        return {"edm": 0.25, "cm_edm": 250.0}.get(str(self.precondition_type))

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        if sigmas is None:
            ramp = np.linspace(0, 1, n) if timesteps is None else ns.training_ramp(timesteps, self.num_train_timesteps)
            sigmas = np.append(ns.karras_ramp(ramp, self.sigma_min, self.sigma_max, self.rho), 0.0)
        return churned_grid(sigmas, self.timestep, self.s_churn, self.s_tmin, self.s_tmax, self.s_noise)

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        return churned_heun(grid, begin, self._denoiser, self.s_noise)

    def _denoiser(self, sigma: float) -> tuple[Evaluation, Array]:
        t, level, data = float(self.timestep(np.array(sigma))), (1.0, sigma), self.sigma_data
        if self.prediction_type == "sample" and not self.corrects_x0:
            e = Evaluation(t, level, "edm", sigma_data=data)
            return e, e.x0
        norm = float(np.hypot(sigma, data))
        e = Evaluation(t, level, self.prediction_type, corrected=self.corrects_x0, input_scale=1 / norm)
        return e, (data / norm) ** 2 * e.x + (sigma * data / norm) * e.x0
