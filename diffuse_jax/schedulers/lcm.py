"""Multistep consistency sampling of latent consistency models: Luo et al. 2023 (arXiv 2310.04378)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from diffuse_jax.schedulers.ddim import discrete_grid
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.request import check_strength, steps_to_run
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.schedulers.table import Grid, Row

SIGMA_DATA = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LCMScheduler(Scheduler):
    """Few-step sampling: jump to the clean sample, then noise it to the next level.

    The timesteps are chosen from the ``original_inference_steps`` ones of the distillation.

    Options of :meth:`plan`: ``original_inference_steps``; ``grid_strength`` in (0, 1] shortens that list, where
    ``strength`` would leave out the first of the steps that were asked for; ``strided`` takes every k-th timestep of
    the distillation, as the first releases did, instead of spreading the steps evenly.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    original_inference_steps: int = 50
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_scaling: float = 10.0
    rescale_betas_zero_snr: bool = False

    grid_options: ClassVar[tuple[str, ...]] = ("original_inference_steps", "grid_strength", "strided")

    def grid(
        self,
        n: int,
        *,
        timesteps: Array | None,
        sigmas: Array | None,
        grid_strength: float = 1.0,
        original_inference_steps: int | None = None,
        strided: bool = False,
    ) -> Grid:
        check_strength(grid_strength, "grid_strength")
        if timesteps is not None:
            # Explicit timesteps are entered late, as with other samplers.
            timesteps = timesteps[n - steps_to_run(n, grid_strength) :]
        elif sigmas is None:
            timesteps = self._choose(n, original_inference_steps, grid_strength, strided)
        return discrete_grid(self, n, timesteps, sigmas, uniform=False)

    def _choose(self, n: int, original: int | None, strength: float, strided: bool) -> Array:
        """``n`` of the timesteps of the distillation, from the noisiest one that ``strength`` leaves."""
        most = self.original_inference_steps if original is None else original
        if not 1 <= most <= self.num_train_timesteps:
            train = self.num_train_timesteps
            raise ValueError(f"original_inference_steps must lie between 1 and {train}, got {most}")
        timesteps = self.distilled(original, strength)[::-1]
        kept = min(most, len(timesteps))
        if n > kept:
            advice = f", or a grid_strength of at least {n / most:g}" if n <= most else ""
            raise ValueError(
                f"original_inference_steps={most} and grid_strength={strength} leave {kept} timesteps, fewer than"
                f" the {n} steps asked for; use at most {kept} steps{advice}"
            )
        if strided:
            return timesteps[:: len(timesteps) // n][:n]
        return timesteps[np.floor(np.linspace(0, len(timesteps), n, endpoint=False)).astype(int)]

    def distilled(self, original: int | None, strength: float) -> Array:
        """Ascending timesteps to choose from: every ``num_train_timesteps // original``-th one."""
        original = self.original_inference_steps if original is None else original
        count = np.arange(1, int(original * strength) + 1)
        return (count * (self.num_train_timesteps // original) - 1).astype(np.float64)

    def boundary(self, t: Any) -> tuple[Any, Any]:
        """``(c_skip, c_out)`` at timesteps ``t``, a number or an array of any library: a consistency function is
        ``c_skip * x + c_out * x0``, and so the identity at ``t = 0`` (Luo et al. 2023, eq. 9)."""
        scaled = t * self.timestep_scaling
        norm2 = scaled**2 + SIGMA_DATA**2
        return SIGMA_DATA**2 / norm2, scaled / norm2**0.5

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        for i in range(begin, len(grid.timesteps)):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            c_skip, c_out = self.boundary(e.timestep)
            denoised = c_skip * e.x + c_out * e.x0
            alpha, sigma = grid.target[i] if i + 1 < len(grid.timesteps) else (1.0, 0.0)
            yield e.row(alpha * denoised + sigma * e.noise)
