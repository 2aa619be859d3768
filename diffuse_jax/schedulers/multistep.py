"""What the exponential integrators (DPM-Solver, DEIS, UniPC, SA-Solver) share: settings, grid, the form of one step.

All solve the diffusion equation exactly but for the network's output, in ``lambda = log(alpha / sigma)``. A step of
length ``h`` in lambda is ``x' = p * x - q * (expm1(u) * m0 + ...)``, where the output ``m0`` is the clean sample and
``(p, q, u) = (sigma'/sigma, alpha', -h)``, or the noise and ``(p, q, u) = (alpha'/alpha, sigma', h)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import factorial
from typing import Any, ClassVar, NamedTuple

import numpy as np

from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.base import Scheduler
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Evaluation, Grid

FEW_STEPS = 15
"""Runs shorter than this end with steps of lower order (``lower_order_final``)."""


class Step(NamedTuple):
    """Coefficients of one exponential-integrator step; see the module."""

    p: float
    q: float
    u: float


def log_snr_half(level: Array) -> float:
    """``lambda = log(alpha / sigma)`` of an (alpha, sigma) pair; infinite for a clean sample."""
    return float(np.inf if level[1] == 0 else np.log(level[0] / level[1]))


def exponential_step(source: Array, target: Array, *, data: bool) -> Step:
    """The step between two levels, for a network output read as clean data or as noise."""
    if source[1] == 0 or (target[1] == 0 and not data):
        way = "from" if source[1] == 0 else "to"
        raise ValueError(
            f"this sampler cannot step {way} sigma 0, where lambda = log(alpha / sigma) is infinite"
            f"{'' if data else ' (it extrapolates noise)'}; give sigmas that are above 0"
        )
    h = log_snr_half(target) - log_snr_half(source)
    if data:
        return Step(target[1] / source[1], target[0], -h)
    return Step(target[0] / source[0], target[1], h)


def adams_weights(nodes: Sequence[float], h: float, rate: float = 1.0) -> Array:
    """Weights ``W`` for which ``sum(W * f(nodes))`` is the integral of ``f(w) exp(-rate * w)`` over [0, h].

    Exact for polynomials of a degree below the number of nodes.
    """
    from scipy.special import gammainc

    k = np.arange(len(nodes))
    moments = [factorial(i) / rate ** (i + 1) * gammainc(i + 1, rate * h) / h**i for i in k]
    if len(nodes) == 1:
        return np.array(moments)
    return np.linalg.solve(np.vander(np.asarray(nodes) / h, increasing=True).T, moments)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExponentialIntegrator(Scheduler, abstract=True):
    """Settings and grid of all samplers of this kind; each file adds its update.

    Attributes:
      timestep_spacing: see :class:`Scheduler`; the step from the smallest timestep goes to the final level, which is
        left out of the spacing.
      thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding (Saharia et al. 2022).
      use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: spacings of sigmas instead of timesteps.
    """

    timestep_spacing: str = "linspace"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0

    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"use_flow_sigmas": (False, None)}

    def __post_init__(self) -> None:
        super().__post_init__()
        sg.sigma_spacing(self)

    @property
    def last_timesteps(self) -> int:
        """Training timesteps below this one are used: with ``lambda_min_clipped`` those of a larger lambda.

        The cosine schedule has nearly infinite noise at the timesteps that are then left out.
        """
        clipped = getattr(self, "lambda_min_clipped", -np.inf)
        return int(self.num_train_timesteps - np.searchsorted(-np.log(self.sigma_table[::-1]), clipped))

    @property
    def ends_clean(self) -> bool:
        """Whether the last step goes to sigma 0."""
        return getattr(self, "final_sigmas_type", "sigma_min") == "zero"

    def whole_timesteps(self, t: Array) -> Array:
        """Whole timesteps for the network from the fractional ones of a spacing of sigmas."""
        return np.round(t) if self.use_karras_sigmas else np.trunc(t)

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        t, s = self._spaced(n, timesteps, sigmas)
        levels = sg.with_alpha(s, self.coordinates)
        return Grid(t, levels[:-1], levels[1:])

    def _spaced(self, n: int, timesteps: Array | None, sigmas: Array | None) -> tuple[Array, Array]:
        """Timesteps and, one more, noise levels."""
        table, up = self.sigma_table, 1 if self.ascends else -1
        if sigmas is not None:
            sg.check_no_spacing(self, "sigmas")
            return ns.sigma_to_timestep(sigmas[:-1], table), sigmas
        if sg.sigma_spacing(self):
            if timesteps is not None:
                sg.check_no_spacing(self, "timesteps")
            # A spacing reaches both ends itself, so without a clean end the last of several steps stays where it is.
            s = sg.respaced(self, table[0], table[-1], max(n, 2))[::-up]
            t, s, last = self.whole_timesteps(ns.sigma_to_timestep(s[:n], table)), s[:n], s[-1]
        else:
            t = self.spaced_timesteps(n)[::up] if timesteps is None else timesteps
            s, last = sg.at_timesteps(table, t), table[self.last_timesteps - 1 if self.ascends else 0]
        return t, np.append(s, 0.0 if self.ends_clean else last)

    def spaced_timesteps(self, n: int) -> Array:
        """``n`` ascending timesteps of a spacing of one more, whose last point (the first, backwards) is left out."""
        last, train = self.last_timesteps, self.num_train_timesteps
        if self.timestep_spacing == "linspace":
            t = np.round(np.linspace(0, last - 1, n + 1))
        elif self.timestep_spacing == "leading":
            t = (np.arange(n + 1) * (last // (n + 1)) + self.steps_offset).astype(np.float64)
        else:
            t = np.round(np.arange(last, 0, -train / n))[:n][::-1] - 1
        t = t[:n] if self.ascends else t[-n:]
        if np.any(np.diff(t) <= 0) or t[-1] >= train or t[0] < 0:
            raise ValueError(
                f"{self.class_name} cannot place {n} steps on {last} timesteps with spacing"
                f" {self.timestep_spacing!r} and steps_offset={self.steps_offset}; use fewer steps"
            )
        return t

    def newest_output(self, e: Evaluation, *, data: bool) -> Array:
        """What is extrapolated: the clean sample, or the noise that goes with it where it is thresholded."""
        if data:
            return e.x0
        return e.eps_from_x0() if self.corrects_x0 else e.eps
