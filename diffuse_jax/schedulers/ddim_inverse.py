"""DDIM run backwards, from an image to the noise that DDIM would make it from: Song et al. 2020 (arXiv 2010.02502).

The ODE of the paper's eq. 14 is integrated upwards by the same formula, eq. 12. Each step evaluates the network on the
sample of its lower end with the timestep of its upper end (Mokady et al. 2022, arXiv 2211.09794, section 3.2), so
inversion followed by sampling reproduces the image only in the limit of small steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from diffuse_jax.schedulers.ddim import discrete_grid
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.schedulers.table import Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIMInverseScheduler(Scheduler):
    """DDIM inversion: timesteps ascend and the first sample is an image, ``plan.resume(x0)``.

    At each step the network gets the timestep that the step goes to. With ``set_alpha_to_one`` the image is treated as
    clean, otherwise as a sample at timestep 0. ``strength`` stops early (DiffEdit).
    """

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False

    ascends: ClassVar[bool] = True
    renamed: ClassVar[dict[str, str]] = {"set_alpha_to_zero": "set_alpha_to_one"}

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        down = discrete_grid(self, n, None if timesteps is None else timesteps[::-1], sigmas)
        return Grid(
            down.timesteps[::-1], down.target[::-1], down.source[::-1], stride=down.stride, final=down.source[0]
        )

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        if self.prediction_type == "sample" and grid.source[0, 1] == 0:
            raise ValueError(
                "a network that predicts the clean sample says nothing about the noise to add to a clean image; set"
                " set_alpha_to_one=False, which treats the image as a sample at timestep 0"
            )
        for t, source, (alpha, sigma) in zip(grid.timesteps, grid.source, grid.target, strict=True):
            e = self.evaluation(t, source)
            yield e.row(alpha * e.x0 + sigma * e.eps)
