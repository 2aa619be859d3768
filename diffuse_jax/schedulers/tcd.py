"""Sampling of models from trajectory consistency distillation: Zheng et al. 2024 (arXiv 2402.19159)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from diffuse_jax.schedulers.lcm import LCMScheduler
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class TCDScheduler(LCMScheduler):
    """Few-step sampling: jump along the trajectory below the next level, then add noise up to it.

    Timesteps are chosen as by :class:`LCMScheduler`. The last step goes to timestep 0.

    Options of :meth:`plan`: ``eta`` (the paper's gamma) in [0, 1], how far below the next timestep a jump goes: 0
    draws no noise, 1 jumps to timestep 0; ``original_inference_steps`` frees the choice of timesteps from the grid of
    the distillation, and limits the number of steps; ``grid_strength`` as for :class:`LCMScheduler`.
    """

    grid_options: ClassVar[tuple[str, ...]] = ("original_inference_steps", "grid_strength")
    step_options: ClassVar[tuple[str, ...]] = ("eta",)

    def distilled(self, original: int | None, strength: float) -> Array:
        if original is None:
            return super().distilled(None, strength)
        return np.arange(int(self.num_train_timesteps * strength), dtype=np.float64)

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None, **options: Any) -> Grid:
        grid = super().grid(n, timesteps=timesteps, sigmas=sigmas, **options)
        return dataclasses.replace(grid, target=np.append(grid.target[:-1], self.train_levels()[:1], axis=0))

    def evaluations(self, grid: Grid, begin: int, eta: float = 0.3) -> Iterator[Row]:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie between 0 (no noise) and 1, got {eta}")
        levels = self.train_levels()
        following = np.append(grid.timesteps[1:], 0.0)
        for i in range(begin, len(grid.timesteps)):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            alpha, sigma = levels[int(np.floor((1 - eta) * following[i]))]
            # Strategic stochastic sampling: the noise that leads from the jump's end to the next level.
            ratio = grid.target[i, 0] / alpha
            yield e.row(ratio * (alpha * e.x0 + sigma * e.eps) + np.sqrt(1 - ratio**2) * e.noise)
