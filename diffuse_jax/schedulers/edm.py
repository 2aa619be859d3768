"""The base of samplers for EDM networks: Karras et al. 2022 (arXiv 2206.00364), table 1, column "Ours"."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from diffuse_jax.allowed import Positive
from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.continuous import ContinuousScheduler
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Evaluation, Grid, Level


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMScheduler(ContinuousScheduler, abstract=True):
    """Settings, levels and preconditioning; samples are ``x0 + sigma * eps``.

    The network gets ``x / sqrt(sigma^2 + sigma_data^2)`` and the timestep ``log(sigma) / 4``. ``prediction_type`` is
    ``epsilon`` for the network F of the paper, ``v_prediction`` for the same with the other sign, or ``sample``.
    Levels run from ``sigma_max`` to ``sigma_min``, spaced by ``sigma_schedule``: ``karras`` (eq. 5, with ``rho``) or
    ``exponential``, and then to 0 or, with ``final_sigmas_type="sigma_min"``, nowhere further.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5  # type: ignore[misc]  # a class attribute of others
    sigma_schedule: str = "karras"
    rho: Positive = 7.0
    final_sigmas_type: str = "zero"

    coordinates: ClassVar[str] = "exploding"
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "sigma_schedule": ("karras", "exponential"),
        "final_sigmas_type": sg.FINAL_SIGMAS,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sigma_range(self.class_name, self.sigma_min, self.sigma_max)

    @property
    def timestep_range(self) -> tuple[float, float]:
        low, high = (float(self.timestep(np.array(sigma))) for sigma in (self.sigma_min, self.sigma_max))
        return low, high

    def timestep(self, sigma: Any, xp: Any = np) -> Any:
        """The network's noise conditioning ``c_noise`` at these noise levels, with ``xp`` NumPy or ``jax.numpy``."""
        return xp.asarray(xp.log(sigma) / 4)

    def level(self, t: Any, xp: Any = np) -> tuple[Any, Any]:
        return xp.ones_like(t), xp.exp(4 * t)

    def evaluation(self, timestep: float, level: Level) -> Evaluation:
        kind = "edm" if self.prediction_type == "epsilon" else self.prediction_type
        return Evaluation(timestep, level, kind, corrected=self.corrects_x0, sigma_data=self.sigma_data)

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        if sigmas is not None:
            s = sigmas
        else:
            if timesteps is not None:
                s = self.level(timesteps)[1]
            elif self.sigma_schedule == "karras":
                s = ns.karras_sigmas(self.sigma_min, self.sigma_max, n, self.rho)
            else:
                s = ns.exponential_sigmas(self.sigma_min, self.sigma_max, n)
            # A spacing reaches sigma_min only up to rounding, and a step upwards, however small, has no solution.
            s = np.append(s, min(self.sigma_min, s[-1]) if self.final_sigmas_type == "sigma_min" else 0.0)
        levels = sg.with_alpha(s, self.coordinates)
        t = self.timestep(s[:-1]) if timesteps is None else timesteps
        return Grid(t, levels[:-1], levels[1:], float(np.hypot(s[0], 1)))


def check_sigma_range(name: str, low: float, high: float) -> None:
    """Levels run from the high to the low one, both above 0."""
    if not 0 < low < high:
        raise ValueError(f"{name}: levels run from sigma_max down to sigma_min above 0, got {high:g} and {low:g}")
