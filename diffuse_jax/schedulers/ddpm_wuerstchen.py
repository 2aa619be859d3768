"""Ancestral sampling in continuous time, the sampler of Würstchen: Pernias et al. 2023 (arXiv 2306.00637)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from diffuse_jax.schedulers.continuous import ContinuousScheduler
from diffuse_jax.schedulers.ddpm import posterior
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Grid, Row, Table

ALPHA_BAR_RANGE = (0.0001, 0.9999)
"""The cosine schedule is cut off here, so even the last sample keeps a trace of noise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPMWuerstchenScheduler(ContinuousScheduler):
    """DDPM steps (Ho et al. 2020, eq. 7) between times from 1 to 0, which are the network's timesteps.

    The levels are those of the cosine schedule (Nichol and Dhariwal 2021, eq. 17) with offset ``s``, at times that
    ``scaler`` bends towards more noise (above 1) or towards less (below 1).

    Explicit ``timesteps`` may, as in diffusers, end with the 0 that the last step goes to.
    """

    scaler: float = 1.0
    s: float = 0.008

    absent: ClassVar[tuple[str, ...]] = (*ContinuousScheduler.absent, "num_train_timesteps", "prediction_type")

    @property
    def timestep_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def level(self, t: Any, xp: Any = np) -> tuple[Any, Any]:
        t = 1 - (1 - t) ** self.scaler if self.scaler > 1 else t**self.scaler
        angle = np.pi / 2 / (1 + self.s)
        alpha_bar = xp.clip(xp.cos((t + self.s) * angle) ** 2 / np.cos(self.s * angle) ** 2, *ALPHA_BAR_RANGE)
        return xp.sqrt(alpha_bar), xp.sqrt(1 - alpha_bar)

    def table(
        self, num_inference_steps: int | None = None, *, timesteps: Sequence[float] | None = None, **options: Any
    ) -> Table:
        """The run as a float64 table; a final timestep of 0 does not count as a step."""
        if timesteps is not None and len(timesteps) > 1 and timesteps[-1] == 0:
            timesteps = timesteps[:-1]
        return super().table(num_inference_steps, timesteps=timesteps, **options)

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        if sigmas is not None:
            raise ValueError(
                f"{self.class_name} has its levels at times; give timesteps= from 1 to 0 instead of sigmas="
            )
        t = np.linspace(1, 0, n + 1) if timesteps is None else np.append(timesteps, 0.0)
        levels = np.stack(self.level(t), -1)
        seen = even_times(n) if timesteps is None else t  # by the network
        return Grid(seen[:-1], levels[:-1], levels[1:])

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        n = len(grid.timesteps)
        for i in range(begin, n):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            mean, variance, _ = posterior(e, grid.target[i])
            yield e.row(mean + (np.sqrt(variance) if i + 1 < n else 0.0) * e.noise)


def even_times(n: int) -> Array:
    """``n + 1`` times from 1 to 0, evenly spaced and rounded as PyTorch's ``linspace`` does in float32.

    The networks multiply them by 10000 before they take sines, so the last digit shows.
    """
    step, i = float(np.float32(1) / np.float32(n)), np.arange(n + 1)
    return np.where(i < (n + 1) // 2, 1 - step * i, step * (n - i)).astype(np.float32).astype(np.float64)
