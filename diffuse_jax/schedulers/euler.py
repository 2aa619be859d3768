"""Euler's method on the probability-flow ODE in sigma (Karras et al. 2022, alg. 1 and 2), plain and ancestral."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.schedulers.table import Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerDiscreteScheduler(Scheduler):
    """Euler steps; samples are ``x0 + sigma * eps``.

    Options of :meth:`plan`: ``s_churn``, ``s_tmin``, ``s_tmax``, ``s_noise`` (Karras et al. 2022, alg. 2).
    """

    timestep_spacing: str = "linspace"
    interpolation_type: str = "linear"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: str = "discrete"
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: str = "zero"

    coordinates: ClassVar[str] = "exploding"
    step_options: ClassVar[tuple[str, ...]] = ("s_churn", "s_tmin", "s_tmax", "s_noise")
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"),
        "final_sigmas_type": sg.FINAL_SIGMAS,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        sg.sigma_spacing(self)

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        return exploding_grid(self, n, timesteps, sigmas)

    def evaluations(self, grid: Grid, begin: int, **churn: float) -> Iterator[Row]:
        return churned_euler(self, grid, begin, read_raised=self.prediction_type == "epsilon", **churn)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerAncestralDiscreteScheduler(Scheduler):
    """Euler steps to a lower level than the next one, then fresh noise up to it; samples are ``x0 + sigma * eps``."""

    timestep_spacing: str = "linspace"
    rescale_betas_zero_snr: bool = False

    coordinates: ClassVar[str] = "exploding"

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        return exploding_grid(self, n, timesteps, sigmas)

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        for t, source, (_, sigma) in zip(grid.timesteps[begin:], grid.source[begin:], grid.target[begin:], strict=True):
            e = self.evaluation(t, source)
            down, up = ancestral_split(e.sigma, sigma)
            yield e.row(e.x + (down - e.sigma) * (e.x - e.x0) / e.sigma + up * e.noise)


def churned(sigma: float, gamma: float, low: float, high: float) -> float:
    """The level that noise is added up to before a step (Karras et al. 2022, alg. 2)."""
    return sigma * (1 + (min(gamma, 2**0.5 - 1) if low <= sigma <= high else 0.0))


def ancestral_split(sigma: float, target: float) -> tuple[float, float]:
    """The level of the deterministic part of a step to ``target``, and the standard deviation of the noise after it."""
    return target**2 / sigma, target * np.sqrt(1 - (target / sigma) ** 2)


def churned_euler(
    scheduler: Scheduler,
    grid: Grid,
    begin: int,
    *,
    read_raised: bool,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = np.inf,
    s_noise: float = 1.0,
) -> Iterator[Row]:
    """Euler steps from levels raised by churn (Karras et al. 2022, alg. 2), samples ``x0 + sigma * eps``.

    The network is evaluated before the noise of a step is added, and its output is read as if it had been evaluated
    after (``read_raised``) or at its own level, as in published samplers.
    """
    for i in range(begin, len(grid.timesteps)):
        e = scheduler.evaluation(grid.timesteps[i], grid.source[i])
        sigma_hat = churned(e.sigma, s_churn / len(grid.timesteps), s_tmin, s_tmax)
        x_hat = e.x + s_noise * np.sqrt(sigma_hat**2 - e.sigma**2) * e.noise
        level = sigma_hat if read_raised else e.sigma
        x0 = ns.predict_x0(e.prediction_type, x_hat, e.output, 1.0, level, e.sigma_data)
        yield e.row(x_hat + (grid.target[i, 1] - sigma_hat) * (x_hat - x0) / sigma_hat)


def exploding_grid(scheduler: Scheduler, n: int, timesteps: Array | None, sigmas: Array | None) -> Grid:
    """Levels ``(1, sigma)`` from a spacing of timesteps, a spacing of sigmas, or explicit ones of either."""
    table = scheduler.sigma_table
    if sigmas is not None:
        sg.check_no_spacing(scheduler, "sigmas")
        t, s = ns.sigma_to_timestep(sigmas[:-1], table), sigmas
    else:
        t, s = _spaced(scheduler, table, n, timesteps)
    if getattr(scheduler, "timestep_type", "discrete") == "continuous" and scheduler.prediction_type == "v_prediction":
        if timesteps is not None:
            raise ValueError(
                "timestep_type='continuous' derives timesteps from sigmas; give sigmas= instead of timesteps="
            )
        t = 0.25 * np.log(s[: len(t)])
    levels = sg.with_alpha(s, scheduler.coordinates)
    # With leading spacing the first level lies below the one the network was trained to start from.
    scale = s.max() if scheduler.timestep_spacing != "leading" else np.sqrt(s.max() ** 2 + 1)
    return Grid(t, levels[: len(t)], levels[1 : len(t) + 1], scale)


def _spaced(scheduler: Scheduler, table: Array, n: int, timesteps: Array | None) -> tuple[Array, Array]:
    t = timesteps
    if t is None:
        train, offset = scheduler.num_train_timesteps, scheduler.steps_offset
        t = ns.space_timesteps(scheduler.timestep_spacing, train, n, offset, rounded=False)
    else:
        sg.check_no_spacing(scheduler, "timesteps")
    s = sg.at_timesteps(table, t)
    if getattr(scheduler, "interpolation_type", "linear") == "log_linear":
        s = ns.exponential_sigmas(table[0], table[-1], n + 1)
    if sg.sigma_spacing(scheduler):
        s = sg.respaced(scheduler, s[-1], s[0], n)
        t = ns.sigma_to_timestep(s, table)
    last = min(table[0], s[-1]) if getattr(scheduler, "final_sigmas_type", "zero") == "sigma_min" else 0.0
    return t, np.append(s, last)
