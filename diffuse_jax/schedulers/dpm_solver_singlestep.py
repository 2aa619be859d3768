"""DPM-Solver and DPM-Solver++, singlestep: Lu et al. 2022 (arXiv 2206.00927, alg. 1 and 2; 2211.01095, alg. 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from diffuse_jax.schedulers import flow
from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.dpm_solver import DPMSolver
from diffuse_jax.schedulers.multistep import log_snr_half
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverSinglestepScheduler(DPMSolver):
    """Runge-Kutta-like exponential integrator: blocks of ``solver_order`` evaluations.

    A block of order 3 steps with order 1 to the next level, from where it started with order 2 to the level after it,
    and again from where it started with order 3 to the level after that. The number of steps counts evaluations. The
    last evaluation has order 1 if it goes to a clean sample, or with ``lower_order_final`` if it ends a whole block.
    """

    lower_order_final: bool = False
    final_sigmas_type: str = "zero"
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"

    absent: ClassVar[tuple[str, ...]] = ("timestep_spacing", "steps_offset")
    grid_options: ClassVar[tuple[str, ...]] = ("mu",)
    choices: ClassVar[dict[str, tuple[Any, ...]]] = DPMSolver.choices | {
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"),
        "final_sigmas_type": sg.FINAL_SIGMAS,
        "time_shift_type": flow.SHIFT_TYPES,
    }

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        n = len(grid.timesteps)
        for i in range(begin, n):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            order = 1 + i % self.solver_order
            if grid.target[i, 1] == 0 or (i + 1 == n and order == self.solver_order and self.lower_order_final):
                order = 1
            # A run that is entered within a block lacks the outputs before that.
            order = min(order, i - begin + 1)
            outputs = [self.newest_output(e, data=self.predicts_data), *e.memory[:2]]
            origin = e.x if order == 1 else e.memory[2]
            levels = [grid.target[i], *grid.source[i - order + 1 : i + 1][::-1]]
            taylor = self._derivatives(outputs[:order], [log_snr_half(level) for level in levels])
            midpoint = order == 2 and self.solver_type == "midpoint"
            x = self.advance(e, origin, levels[-1], levels[0], taylor, midpoint=midpoint)
            yield e.row(x, [*outputs[:2], origin])

    def _derivatives(self, m: Sequence[Array], lambdas: Sequence[float]) -> list[Array]:
        """Output and scaled derivatives where the block begins; everything runs from the newest backwards."""
        if len(m) == 1:
            return [m[0]]
        h = lambdas[0] - lambdas[-1]
        # Where the later outputs lie, as shares of the step, and the slopes to them.
        shares = [(lam - lambdas[-1]) / h for lam in lambdas[1:-1]]
        slopes = [(output - m[-1]) / r for output, r in zip(m[:-1], shares, strict=True)]
        if len(m) == 2 or self.solver_type == "midpoint":
            return [m[-1], slopes[0]]
        curvature = (slopes[0] - slopes[1]) / (shares[0] - shares[1])
        return [m[-1], slopes[0] - shares[0] * curvature, 2 * curvature]
