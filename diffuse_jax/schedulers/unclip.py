"""The sampler of unCLIP models (Karlo, Kandinsky's prior): Ramesh et al. 2022 (arXiv 2204.06125).

It is ancestral sampling (Ho et al. 2020, eq. 7) on the cosine schedule (Nichol and Dhariwal 2021, eq. 17) with
timesteps that include the first and the last one of training.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from diffuse_jax.schedulers.ddpm import DDPMScheduler
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnCLIPScheduler(DDPMScheduler):
    """DDPM with the few settings that unCLIP models vary; see :class:`DDPMScheduler` for ``variance_type``."""

    variance_type: str = "fixed_small_log"
    beta_schedule: str = "squaredcos_cap_v2"
    timestep_spacing: str = "linspace"

    absent: ClassVar[tuple[str, ...]] = (
        "beta_start",
        "beta_end",
        "trained_betas",
        "timestep_spacing",
        "steps_offset",
        "thresholding",
        "dynamic_thresholding_ratio",
        "sample_max_value",
        "rescale_betas_zero_snr",
    )
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "beta_schedule": ("squaredcos_cap_v2",),
        "prediction_type": ("epsilon", "sample"),
        "variance_type": ("fixed_small_log", "learned_range"),
    }

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        if n == 1 and timesteps is None and sigmas is None:
            # Both ends of training do not fit into one step; a run starts from noise.
            timesteps = np.array([self.num_train_timesteps - 1.0])
        return super().grid(n, timesteps=timesteps, sigmas=sigmas)
