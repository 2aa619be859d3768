"""DPM-Solver and DPM-Solver++, multistep: Lu et al. 2022 (arXiv 2206.00927 and 2211.01095)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np

from diffuse_jax.allowed import INFINITY, Range
from diffuse_jax.schedulers import flow
from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.ddpm import VARIANCE_TYPES
from diffuse_jax.schedulers.exponential import ExponentialIntegrator
from diffuse_jax.schedulers.multistep import FEW_STEPS, exponential_step, log_snr_half
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Evaluation, Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolver(ExponentialIntegrator, abstract=True):
    """Base of the multistep, singlestep and inverse variants: their settings and the form of an update.

    ``algorithm_type`` sets what is extrapolated, the clean sample (names ending in ``++``) or the noise, and whether
    fresh noise is added (``sde-``). With ``variance_type`` the network also returns a variance, which is ignored.
    """

    solver_order: int = 2
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    lambda_min_clipped: Annotated[float, Range(-INFINITY, 1e9)] = -float("inf")
    variance_type: str | None = None

    choices: ClassVar[dict[str, tuple[Any, ...]]] = ExponentialIntegrator.choices | {
        "solver_order": (1, 2, 3),
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
        "variance_type": (None, *VARIANCE_TYPES),
    }
    aliases: ClassVar[dict[str, dict[str, str]]] = {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.predicts_data and self.ends_clean:
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

    @property
    def half(self) -> float:
        """What is subtracted in the weight of the second derivative: 0.5 in Taylor's formula; PyTorch's stochastic
        variants have -0.5, and published images follow it."""
        return -0.5 if self.algorithm_type == "sde-dpmsolver++" else 0.5

    def advance(
        self,
        e: Evaluation,
        x: Array,
        source: Array,
        target: Array,
        outputs: Sequence[Array],
        *,
        midpoint: bool,
    ) -> Array:
        """One step from ``x`` at level ``source`` to ``target``: the integral of a Taylor polynomial of the output.

        Args:
          e: its noise is used.
          x, source, target: where the step begins and ends.
          outputs: the output at ``source`` and its derivatives, the k-th times ``h ** k`` (h: the step in lambda).
          midpoint: use the second-order formula of DPM-Solver++ (2M, 2S) in place of Taylor's.
        """
        p, q, u, std = self._step(source, target)
        phi1 = np.expm1(u)
        x = p * x - q * phi1 * outputs[0] + std * e.noise
        if len(outputs) == 1 or u == 0:
            return x
        weights = [0.5 * phi1 if midpoint else phi1 / u - 1, (phi1 - u) / u**2 - self.half]
        return x - q * sum(w * derivative for w, derivative in zip(weights, outputs[1:], strict=False))

    def _step(self, source: Array, target: Array) -> tuple[float, float, float, float]:
        """``(p, q, u)`` of the step and the amount of fresh noise (sde-: DPM-Solver++, appendix on SDE solvers)."""
        p, q, u = exponential_step(source, target, data=self.predicts_data)
        if self.algorithm_type == "sde-dpmsolver++":
            return p * np.exp(u), q, 2 * u, target[1] * np.sqrt(-np.expm1(2 * u))
        if self.algorithm_type == "sde-dpmsolver":
            return p, 2 * q, u, target[1] * np.sqrt(np.expm1(2 * u))
        return p, q, u, 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverMultistepScheduler(DPMSolver):
    """Exponential multistep integrator of order 1 to 3.

    ``solver_type`` matters for order 2. The last step has order 1 if it goes to a clean sample, with
    ``euler_at_final``, or with ``lower_order_final`` in a run of fewer than 15 steps.
    """

    euler_at_final: bool = False
    use_lu_lambdas: bool = False
    final_sigmas_type: str = "zero"
    rescale_betas_zero_snr: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"

    grid_options: ClassVar[tuple[str, ...]] = ("mu",)
    choices: ClassVar[dict[str, tuple[Any, ...]]] = DPMSolver.choices | {
        "final_sigmas_type": sg.FINAL_SIGMAS,
        "time_shift_type": flow.SHIFT_TYPES,
    }

    def whole_timesteps(self, t: Array) -> Array:
        # The cosine schedule rounds towards 0, as published samplers do.
        rounds = (self.use_karras_sigmas or self.use_lu_lambdas) and self.beta_schedule != "squaredcos_cap_v2"
        return np.round(t) if rounds else np.trunc(t)

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        return multistep(self, grid, begin, euler_at_final=self.euler_at_final)


def multistep(scheduler: DPMSolver, grid: Grid, begin: int, *, euler_at_final: bool) -> Iterator[Row]:
    """The rows of a run whose derivatives come from the outputs of earlier steps."""
    n = len(grid.timesteps)
    few = scheduler.lower_order_final and n < FEW_STEPS
    for i in range(begin, n):
        e = scheduler.evaluation(grid.timesteps[i], grid.source[i])
        outputs = [scheduler.newest_output(e, data=scheduler.predicts_data), *e.memory[:2]]
        order = min(scheduler.solver_order, i - begin + 1, n - i if few else n)
        if grid.target[i, 1] == 0 or (i + 1 == n and euler_at_final):
            order = 1
        levels = [grid.target[i], *grid.source[i - order + 1 : i + 1][::-1]]
        taylor = _derivatives(outputs[:order], [log_snr_half(level) for level in levels])
        midpoint = order == 2 and scheduler.solver_type == "midpoint"
        x = scheduler.advance(e, e.x, levels[1], levels[0], taylor, midpoint=midpoint)
        yield e.row(x, outputs[:2])


def _derivatives(m: Sequence[Array], lambdas: Sequence[float]) -> list[Array]:
    """Newest output and its scaled derivatives, from divided differences; everything runs from the newest backwards."""
    if len(m) == 1:
        return [m[0]]
    h, h0 = lambdas[0] - lambdas[1], lambdas[1] - lambdas[2]
    d1 = (h / h0) * (m[0] - m[1])
    if len(m) == 2:
        return [m[0], d1]
    h1 = lambdas[2] - lambdas[3]
    change = (d1 - (h / h1) * (m[1] - m[2])) / (h0 + h1)
    return [m[0], d1 + h0 * change, h * change]
