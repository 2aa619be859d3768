"""iPNDM: linear multistep sampling without a warm-up, Zhang and Chen 2022 (arXiv 2204.13902, section 4).

The formulas are those of PNDM (Liu et al. 2022, arXiv 2202.09778, eq. 9), but where PNDM begins with Runge-Kutta steps,
the first steps here use a lower order, as far as there are earlier outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from diffuse_jax.schedulers.continuous import ContinuousScheduler
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.pndm import ADAMS_BASHFORTH
from diffuse_jax.schedulers.table import Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class IPNDMScheduler(ContinuousScheduler):
    """Multistep method of order 4 for networks that predict v (Dance Diffusion).

    The network's time runs from 1 (noise) to 0 with ``sigma = sin(pi / 2 * t)``. ``trained_betas`` are the sigmas
    of a run of their own, ``num_train_timesteps`` of them: one per step and the final one.

    In pure noise, where noise alone says nothing about the image, the first step takes the image to be 0, as in
    diffusers. Option of :meth:`plan`: ``as_published=True`` takes the image that v says.
    """

    prediction_type: str = "v_prediction"

    step_options: ClassVar[tuple[str, ...]] = ("as_published",)
    absent: ClassVar[tuple[str, ...]] = (
        *(name for name in ContinuousScheduler.absent if name != "trained_betas"),
        "prediction_type",
    )

    @property
    def timestep_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def level(self, t: Any, xp: Any = np) -> tuple[Any, Any]:
        sigma = xp.sin(np.pi / 2 * t)
        return xp.sqrt(1 - sigma**2), sigma

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        if sigmas is not None:
            raise ValueError(f"{self.class_name} has its levels at timesteps; give timesteps= instead of sigmas=")
        t = np.arcsin(self._sigmas(n)) * 2 / np.pi if timesteps is None else np.append(timesteps, 0.0)
        levels = np.stack(self.level(t), -1)
        return Grid(t[:-1], levels[:-1], levels[1:])

    def _sigmas(self, n: int) -> Array:
        if self.trained_betas is None:
            return np.sin(np.linspace(1, 0, n + 1) * np.pi / 2) ** 2
        if n + 1 != len(self.trained_betas):
            most = len(self.trained_betas)
            raise ValueError(f"trained_betas has the {most} sigmas of {most - 1} steps, {n} steps were asked for")
        return np.array(self.trained_betas)

    def evaluations(self, grid: Grid, begin: int, as_published: bool = False) -> Iterator[Row]:
        for k, i in enumerate(range(begin, len(grid.timesteps))):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            outputs = [e.eps, *e.memory[: min(k, 3)]]
            weights = ADAMS_BASHFORTH[len(outputs) - 1]
            eps = sum((w * m for w, m in zip(weights, outputs, strict=True)), np.zeros_like(e.x))
            alpha, sigma = grid.target[i]
            x0 = (e.x - e.sigma * eps) / e.alpha if e.alpha > 0 else as_published * e.x0
            yield e.row(alpha * x0 + sigma * eps, outputs[:3])
