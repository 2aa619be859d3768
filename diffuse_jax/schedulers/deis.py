"""DEIS: Zhang and Chen 2022, 'Fast Sampling of Diffusion Models with Exponential Integrator' (arXiv 2204.13902)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from diffuse_jax.schedulers import flow
from diffuse_jax.schedulers.exponential import ExponentialIntegrator
from diffuse_jax.schedulers.multistep import FEW_STEPS, adams_weights, exponential_step, log_snr_half
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class DEISMultistepScheduler(ExponentialIntegrator):
    """Exponential Adams-Bashforth steps of order 1 to 3 on the predicted noise (the paper's log-rho variant).

    The noise is extrapolated as a polynomial in ``log rho = log(sigma / alpha)`` (section 3.3 and eq. 15); order 1 is
    DDIM. With ``lower_order_final``, runs of fewer than 15 steps end with steps of order 2 and 1. A run ends at the
    noise level of timestep 0, since noise cannot be extrapolated to a clean sample.

    With flow levels the last step stays where it is, as in diffusers. Option of :meth:`plan`: with
    ``as_published=True`` it goes on to the level of the first training step.
    """

    solver_order: int = 2
    algorithm_type: str = "deis"
    solver_type: str = "logrho"
    lower_order_final: bool = True
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"

    grid_options: ClassVar[tuple[str, ...]] = ("mu", "as_published")
    choices: ClassVar[dict[str, tuple[Any, ...]]] = ExponentialIntegrator.choices | {
        "solver_order": (1, 2, 3),
        "algorithm_type": ("deis",),
        "solver_type": ("logrho",),
        "time_shift_type": flow.SHIFT_TYPES,
    }
    aliases: ClassVar[dict[str, dict[str, str]]] = {
        "algorithm_type": dict.fromkeys(("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"), "deis"),
        "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
    }

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        n = len(grid.timesteps)
        for i in range(begin, n):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            outputs = [self.newest_output(e, data=False), *e.memory[:2]]
            left = n - i if self.lower_order_final and n < FEW_STEPS else n
            order = min(self.solver_order, left, i - begin + 1)
            levels = [grid.target[i], *grid.source[i - order + 1 : i + 1][::-1]]
            yield e.row(self._update(e.x, outputs[:order], levels), outputs[:2])

    def _update(self, x: Array, m: list[Array], levels: list[Array]) -> Array:
        """Eq. 14 with the coefficients of eq. 15; ``m`` and ``levels`` run from the newest backwards."""
        p, q, h = exponential_step(levels[1], levels[0], data=False)
        if h == 0:
            return p * x
        lambdas = [log_snr_half(level) for level in levels[1:]]
        # An integral over rho is one over lambda with weight exp(-lambda), here counted from where the step begins.
        weights = adams_weights([lam - lambdas[0] for lam in lambdas], h)
        return p * x - q * np.exp(h) * sum(w * output for w, output in zip(weights, m, strict=True))
