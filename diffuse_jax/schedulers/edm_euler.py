"""Euler's method for EDM networks: Karras et al. 2022 (arXiv 2206.00364), alg. 2 without its second evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers.edm import EDMScheduler
from diffuse_jax.schedulers.euler import churned
from diffuse_jax.schedulers.table import Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMEulerScheduler(EDMScheduler):
    """Euler steps.

    Options of :meth:`plan`: ``s_churn``, ``s_tmin``, ``s_tmax``, ``s_noise``. The network is evaluated before the noise
    of a step is added, and its output read as if it were after, which published pictures follow.
    """

    step_options: ClassVar[tuple[str, ...]] = ("s_churn", "s_tmin", "s_tmax", "s_noise")

    def evaluations(
        self,
        grid: Grid,
        begin: int,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = np.inf,
        s_noise: float = 1.0,
    ) -> Iterator[Row]:
        for i in range(begin, len(grid.timesteps)):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            sigma_hat = churned(e.sigma, s_churn / len(grid.timesteps), s_tmin, s_tmax)
            x_hat = e.x + s_noise * np.sqrt(sigma_hat**2 - e.sigma**2) * e.noise
            x0 = ns.predict_x0(e.prediction_type, x_hat, e.output, 1.0, sigma_hat, self.sigma_data)
            yield e.row(x_hat + (grid.target[i, 1] - sigma_hat) * (x_hat - x0) / sigma_hat)
