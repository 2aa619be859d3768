"""DDIM: Song, Meng and Ermon 2020, 'Denoising Diffusion Implicit Models' (arXiv 2010.02502)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.schedulers.table import Evaluation, Grid, Level, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIMScheduler(Scheduler):
    """DDIM; deterministic with ``eta=0`` (the default), ancestral sampling with ``eta=1``.

    Options of :meth:`plan`: ``eta``, ``use_clipped_model_output`` (re-derive the noise from the clipped clean sample).
    """

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    rescale_betas_zero_snr: bool = False

    step_options: ClassVar[tuple[str, ...]] = ("eta", "use_clipped_model_output")

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        return discrete_grid(self, n, timesteps, sigmas)

    def evaluations(
        self, grid: Grid, begin: int, eta: float = 0.0, use_clipped_model_output: bool = False
    ) -> Iterator[Row]:
        for t, source, target in zip(grid.timesteps[begin:], grid.source[begin:], grid.target[begin:], strict=True):
            e = self.evaluation(t, source)
            mean, std = ddim_step(e, target, eta, e.eps_from_x0() if use_clipped_model_output else None)
            yield e.row(mean + std * e.noise)


def ddim_step(e: Evaluation, target: Level, eta: float, eps: Array | None = None) -> tuple[Array, float]:
    """Eq. 12: the mean of the next sample and the standard deviation of its noise (eq. 16, 0 at a clean sample).

    Raises:
      ValueError: ``eta`` would add more noise than the next level has, or less than none.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie between 0 (no noise) and 1 (ancestral sampling), got {eta}")
    alpha, sigma = target
    std = eta * (sigma / e.sigma) * np.sqrt(max(0.0, 1 - (e.alpha / alpha) ** 2))
    return alpha * e.x0 + np.sqrt(max(0.0, sigma**2 - std**2)) * (e.eps if eps is None else eps), std


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIMParallelScheduler(DDIMScheduler):
    """DDIM under the name that ParaDiGMS configurations use (Shih et al. 2023, arXiv 2305.16317).

    Every plan supports what parallel sampling needs, stepping samples at different evaluations in one call:
    ``plan.step`` with ``[B]`` indices.
    """


def discrete_grid(
    scheduler: Scheduler, n: int, timesteps: Array | None, sigmas: Array | None, *, uniform: bool = True
) -> Grid:
    """The levels of a sampler that steps through training timesteps.

    Args:
      scheduler: its training schedule, spacing and ``set_alpha_to_one`` (where the last step goes) are used.
      n: number of steps.
      timesteps: explicit timesteps; then each step goes to the next one.
      sigmas: not supported; must be None.
      uniform: each step goes back by ``num_train_timesteps // n``, as in DDIM and PNDM, which with rounded spacings may
        miss the next evaluation's timestep; otherwise each step goes to the next timestep.
    """
    if sigmas is not None:
        raise ValueError(f"{scheduler.class_name} steps through training timesteps; give timesteps= instead of sigmas=")
    train = scheduler.num_train_timesteps
    t = timesteps
    if t is None:
        t = ns.space_timesteps(scheduler.timestep_spacing, train, n, scheduler.steps_offset)
        if t[0] >= train or t[-1] < 0:
            raise ValueError(
                f"{n} steps with spacing {scheduler.timestep_spacing!r} and steps_offset={scheduler.steps_offset} need"
                f" timestep {t[0]:g}, but the last one is {train - 1}; use fewer steps"
            )
    index = t.astype(np.int64)
    stride = train // n if uniform and timesteps is None else None
    after = index - stride if stride else np.append(index[1:], -1)
    levels = scheduler.train_levels()
    final = (1.0, 0.0) if getattr(scheduler, "set_alpha_to_one", True) else levels[0]
    target = np.where((after >= 0)[:, None], levels[after], final)
    return Grid(t, levels[index], target, stride=stride)
