"""DPM-Solver and DPM-Solver++, multistep: Lu et al. 2022 (arXiv 2206.00927 and 2211.01095)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.base import Scheduler
from diffuse_jax.schedulers.multistep import exponential_step, log_snr_half, preserving_grid
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Evaluation, Grid, Row

FEW_STEPS = 15
"""Runs shorter than this end with steps of lower order (``lower_order_final``)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverMultistepScheduler(Scheduler):
    """Exponential multistep integrator of order 1 to 3.

    ``algorithm_type`` says what is extrapolated, the clean sample (names ending in ``++``) or the noise, and whether
    fresh noise is added (``sde-``). ``solver_type`` matters for order 2. The last step has order 1 if it goes to a
    clean sample, with ``euler_at_final``, or with ``lower_order_final`` in a run of fewer than 15 steps.
    """

    timestep_spacing: str = "linspace"
    solver_order: int = 2
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = -float("inf")
    variance_type: str | None = None
    rescale_betas_zero_snr: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"

    choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "solver_order": (1, 2, 3),
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
        "final_sigmas_type": sg.FINAL_SIGMAS,
        "use_flow_sigmas": (False, None),
        "use_dynamic_shifting": (False, None),
    }
    aliases: ClassVar[dict[str, dict[str, str]]] = {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        sg.sigma_spacing(self)
        if not self.predicts_data and self.final_sigmas_type == "zero":
            raise ValueError(
                f"algorithm_type={self.algorithm_type!r} extrapolates noise and cannot step to a clean sample; set"
                f" final_sigmas_type='sigma_min' or algorithm_type={self.algorithm_type + '++'!r}"
            )
        if self.algorithm_type == "sde-dpmsolver" and self.solver_order == 3:
            raise ValueError("algorithm_type='sde-dpmsolver' has orders 1 and 2, got solver_order=3")

    @property
    def predicts_data(self) -> bool:
        """Whether the clean sample is extrapolated, rather than the noise."""
        return self.algorithm_type.endswith("++")

    def whole_timesteps(self, t: Array) -> Array:
        """Whole timesteps for the network from fractional ones (the cosine schedule rounds towards 0)."""
        rounds = (self.use_karras_sigmas or self.use_lu_lambdas) and self.beta_schedule != "squaredcos_cap_v2"
        return np.round(t) if rounds else np.trunc(t)

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        # Timesteps whose lambda is below the limit are left out: the cosine schedule has nearly infinite noise there.
        last = self.num_train_timesteps - np.searchsorted(-np.log(self.sigma_table[::-1]), self.lambda_min_clipped)
        return preserving_grid(self, n, timesteps, sigmas, int(last))

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        n = len(grid.timesteps)
        for i in range(begin, n):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            newest = e.x0 if self.predicts_data else e.eps_from_x0() if self.corrects_x0 else e.eps
            outputs = [newest, *e.memory[:2]]
            order = self._order(n - i, n, i - begin)
            levels = [grid.target[i], *grid.source[i - order + 1 : i + 1][::-1]]
            yield e.row(self._update(e, outputs, levels), outputs[:2])

    def _order(self, left: int, n: int, done: int) -> int:
        """The order of a step with ``left`` of ``n`` steps to go, itself included, after ``done`` steps of this run."""
        few = self.lower_order_final and n < FEW_STEPS
        if left == 1 and (self.euler_at_final or few or self.final_sigmas_type == "zero"):
            return 1
        return min(self.solver_order, done + 1, 2 if left == 2 and few else 3)

    def _update(self, e: Evaluation, m: list[Array], levels: list[Array]) -> Array:
        """One step of order ``len(levels) - 1``; ``levels`` and ``m`` run from the newest backwards."""
        p, q, u, std = self._step(levels[1], levels[0])
        phi1 = np.expm1(u)
        x = p * e.x - q * phi1 * m[0] + std * e.noise
        if len(levels) == 2 or u == 0:
            return x
        lambdas = [log_snr_half(level) for level in levels]
        h, h0 = lambdas[0] - lambdas[1], lambdas[1] - lambdas[2]
        d1 = (h / h0) * (m[0] - m[1])
        if len(levels) == 3:
            return x - q * (0.5 * phi1 if self.solver_type == "midpoint" else phi1 / u - 1) * d1
        h1 = lambdas[2] - lambdas[3]
        d1_older = (h / h1) * (m[1] - m[2])
        d2 = h / (h0 + h1) * (d1 - d1_older)
        d1 = d1 + h0 / (h0 + h1) * (d1 - d1_older)
        # Taylor's formula has -0.5 for all; PyTorch's stochastic variant has +0.5 and published pictures follow it.
        half = 0.5 if self.algorithm_type == "sde-dpmsolver++" else -0.5
        return x - q * (phi1 / u - 1) * d1 - q * ((phi1 - u) / u**2 + half) * d2

    def _step(self, source: Array, target: Array) -> tuple[float, float, float, float]:
        """``(p, q, u)`` of the step and the amount of fresh noise (sde-: DPM-Solver++, appendix on SDE solvers)."""
        p, q, u = exponential_step(source, target, data=self.predicts_data)
        if self.algorithm_type == "sde-dpmsolver++":
            return p * np.exp(u), q, 2 * u, target[1] * np.sqrt(-np.expm1(2 * u))
        if self.algorithm_type == "sde-dpmsolver":
            return p, 2 * q, u, target[1] * np.sqrt(np.expm1(2 * u))
        return p, q, u, 0.0
