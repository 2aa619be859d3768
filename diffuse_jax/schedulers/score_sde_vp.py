"""The variance-preserving SDE, backwards: Song et al. 2021, 'Score-Based Generative Modeling through Stochastic
Differential Equations' (arXiv 2011.13456).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from diffuse_jax.schedulers.continuous import ContinuousScheduler
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreSdeVpScheduler(ContinuousScheduler):
    """Euler-Maruyama steps of equal length on the reverse SDE, for networks that predict the noise.

    The network's time runs from 1 to ``sampling_eps``. The last step adds no noise.
    """

    num_train_timesteps: int = 2000
    beta_min: float = 0.1
    beta_max: float = 20
    sampling_eps: float = 1e-3

    absent: ClassVar[tuple[str, ...]] = (*ContinuousScheduler.absent, "prediction_type")

    @property
    def timestep_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def level(self, t: Any, xp: Any = np) -> tuple[Any, Any]:
        """Eq. 33 of the paper: the marginals of the SDE."""
        log_alpha = -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        return xp.exp(log_alpha), xp.sqrt(-xp.expm1(2 * log_alpha))

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        if timesteps is not None or sigmas is not None:
            raise ValueError(f"{self.class_name} makes steps of equal length; give num_inference_steps")
        t = np.linspace(1, self.sampling_eps, n)
        levels = np.stack(self.level(t), -1)
        return Grid(t, levels, np.append(levels[1:], [(1.0, 0.0)], axis=0))

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        n = len(grid.timesteps)
        dt = 1 / n
        for i in range(begin, n):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            beta = self.beta_min + e.timestep * (self.beta_max - self.beta_min)
            # Eq. 6 and 32: dx = -[f(x, t) - g^2 score] dt + g dw with f = -beta x / 2 and g^2 = beta.
            mean = e.x + beta * dt * (e.x / 2 - e.eps / e.sigma)
            yield e.row(mean + (np.sqrt(beta * dt) if i + 1 < n else 0.0) * e.noise)
