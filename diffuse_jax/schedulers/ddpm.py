"""Ancestral sampling: Ho, Jain and Abbeel 2020, 'Denoising Diffusion Probabilistic Models' (arXiv 2006.11239)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers.ddim import discrete_grid
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.schedulers.table import LEARNED_VARIANCES, Evaluation, Grid, Level, Row

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")

TINY = 1e-20
"""Lower bound of the posterior variance, as in published samplers, which keeps its logarithm finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPMScheduler(Scheduler):
    """DDPM sampling, and the training schedule that fine-tuning starts from.

    ``variance_type`` sets the variance of each step's noise: the posterior variance (``fixed_small``), beta
    (``fixed_large``), an interpolation between them given by the second half of the network's output
    (``learned_range``, Nichol and Dhariwal 2021, eq. 15), or that half itself (``learned``; negative values count as
    0). The names ending in ``_log`` mean the same variances.
    """

    variance_type: str = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    rescale_betas_zero_snr: bool = False

    choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "beta_schedule": (*ns.BETA_SCHEDULES, "sigmoid", "laplace"),
        "variance_type": VARIANCE_TYPES,
    }

    @property
    def learned_variance(self) -> str:
        return self.variance_type if self.variance_type in LEARNED_VARIANCES else ""

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        return discrete_grid(self, n, timesteps, sigmas, uniform=False)

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        for t, source, target in zip(grid.timesteps[begin:], grid.source[begin:], grid.target[begin:], strict=True):
            e = self.evaluation(t, source)
            mean, small, beta = posterior(e, target)
            small = max(small, TINY)
            std = np.sqrt(beta if self.variance_type.startswith("fixed_large") else small)
            bounds = (0.0, 0.0)
            if self.learned_variance:
                std = 1.0
            if self.learned_variance == "learned_range":
                bounds = (float(np.log(small)), float(np.log(beta)))
            yield e.row(mean + (std if t > 0 else 0.0) * e.noise, log_variance=bounds)


def posterior(e: Evaluation, target: Level) -> tuple[Array, float, float]:
    """Ho et al. 2020, eq. 7: mean and variance of the sample at a lower level given ``x`` and ``x0``, and beta."""
    alpha, sigma = target
    step_alpha = (e.alpha / alpha) ** 2
    beta, share = 1 - step_alpha, (sigma / e.sigma) ** 2
    return (alpha * beta / e.sigma**2) * e.x0 + (np.sqrt(step_alpha) * share) * e.x, share * beta, beta


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPMParallelScheduler(DDPMScheduler):
    """DDPM under the name that ParaDiGMS configurations use; see :class:`DDIMParallelScheduler`."""
