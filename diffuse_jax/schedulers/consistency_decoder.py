"""The sampler of the consistency decoder of DALL-E 3, which takes the place of a VAE's decoder.

Multistep consistency sampling (Song et al. 2023, 'Consistency Models', arXiv 2303.01469, alg. 1) on the cosine schedule
(Nichol and Dhariwal 2021, eq. 17), with the preconditioning of Karras et al. 2022 (arXiv 2206.00364, table 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from diffuse_jax.schedulers.ddim import discrete_grid
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.schedulers.table import Evaluation, Grid, Level, Row

TIMESTEPS = (1008.0, 512.0)
"""The two steps that the decoder was designed for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyDecoderScheduler(Scheduler):
    """Two steps: jump to a clean image, noise it to timestep 512, and jump to a clean image again.

    Other steps can be given as ``timesteps``.
    """

    num_train_timesteps: int = 1024
    sigma_data: float = 0.5  # type: ignore[misc]  # a setting here, a constant of other classes
    beta_schedule: str = "squaredcos_cap_v2"

    absent: ClassVar[tuple[str, ...]] = (
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "timestep_spacing",
        "steps_offset",
    )

    def evaluation(self, timestep: float, level: Level) -> Evaluation:
        return Evaluation(timestep, level, "edm", sigma_data=self.sigma_data)

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        if timesteps is None and sigmas is None:
            if n != len(TIMESTEPS) or self.num_train_timesteps <= TIMESTEPS[0]:
                raise ValueError(
                    f"{self.class_name} has two steps, timesteps 1008 and 512, got num_inference_steps={n} of"
                    f" {self.num_train_timesteps}; give timesteps= for others"
                )
            timesteps = np.array(TIMESTEPS)
        grid = discrete_grid(self, n, timesteps, sigmas, uniform=False)
        return dataclasses.replace(grid, init_scale=grid.source[0, 1])

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        for t, source, (alpha, sigma) in zip(
            grid.timesteps[begin:], grid.source[begin:], grid.target[begin:], strict=True
        ):
            e = self.evaluation(t, source)
            yield e.row(alpha * e.x0 + sigma * e.noise)
