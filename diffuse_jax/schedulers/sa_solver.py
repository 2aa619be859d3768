"""SA-Solver, a stochastic Adams predictor-corrector: Xue et al. 2023 (arXiv 2309.05019)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np

from diffuse_jax.allowed import INFINITY, Range
from diffuse_jax.bounds import real
from diffuse_jax.schedulers.ddpm import VARIANCE_TYPES
from diffuse_jax.schedulers.exponential import ExponentialIntegrator
from diffuse_jax.schedulers.multistep import adams_weights, exponential_step, log_snr_half
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Grid, Row


def middle_third(timestep: float) -> float:
    """The ``tau`` of published samplers for 1000 training timesteps: noise from 800 down to 200 only."""
    return 1.0 if 200 <= timestep <= 800 else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SASolverScheduler(ExponentialIntegrator):
    """Adams-Bashforth predictor and Adams-Moulton corrector of order 1 to 4 for the diffusion SDE.

    One evaluation per step serves both. ``algorithm_type`` says what is extrapolated, the clean sample
    (``data_prediction``) or the noise. A run ends at the noise level of timestep 0, or at that of explicit sigmas.

    Options of :meth:`plan`: ``tau``, how much noise is added: a number, or a function of the timestep of each step's
    start. 0 is the ODE, 1 the reversed diffusion; the default is :func:`middle_third`. With flow levels the last step
    stays where it is, as in diffusers; with ``as_published=True`` it goes on to the level of the first training step.
    """

    predictor_order: int = 2
    corrector_order: int = 2
    tau_func: None = None
    algorithm_type: str = "data_prediction"
    lower_order_final: bool = True
    lambda_min_clipped: Annotated[float, Range(-INFINITY, 1e9)] = -float("inf")
    variance_type: str | None = None

    grid_options: ClassVar[tuple[str, ...]] = ("as_published",)
    step_options: ClassVar[tuple[str, ...]] = ("tau",)
    choices: ClassVar[dict[str, tuple[Any, ...]]] = ExponentialIntegrator.choices | {
        "predictor_order": (1, 2, 3, 4),
        "corrector_order": (1, 2, 3, 4),
        "algorithm_type": ("data_prediction", "noise_prediction"),
        "variance_type": (None, *VARIANCE_TYPES),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau_func is not None:
            raise ValueError(
                f"tau_func must be None, got {self.tau_func!r}: JSON holds no functions; use plan(..., tau=)"
            )

    @property
    def predicts_data(self) -> bool:
        """Whether the clean sample is extrapolated, rather than the noise."""
        return self.algorithm_type == "data_prediction"

    def evaluations(
        self, grid: Grid, begin: int, tau: float | Callable[[float], float] = middle_third
    ) -> Iterator[Row]:
        n, corrector, amount = len(grid.timesteps), 0, 0.0
        for i in range(begin, n):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            start, drawn, *older = e.memory
            outputs, x = [self.newest_output(e, data=self.predicts_data), *older], e.x
            if i > begin:
                nodes = grid.source[i - corrector + 1 : i + 1][::-1]
                x = self._update(start, drawn, amount, grid.source[i - 1], grid.source[i], outputs, nodes)
            left = n - i if self.lower_order_final else n
            predictor = 1 if grid.target[i, 1] == 0 else min(self.predictor_order, left, i - begin + 1)
            corrector = min(self.corrector_order, left + 1, i - begin + 2)
            amount = real(tau(e.timestep) if callable(tau) else tau, "tau")
            if amount < 0:
                raise ValueError(f"tau must be at least 0, got {amount} at timestep {e.timestep:g}")
            nodes = grid.source[i - predictor + 1 : i + 1][::-1]
            after = self._update(x, e.noise, amount, grid.source[i], grid.target[i], outputs, nodes)
            # Noise that was not added is not drawn.
            yield e.row(after, [x, e.noise if amount else np.zeros_like(x), *outputs[:3]])

    def _update(
        self, x: Array, noise: Array, tau: float, source: Array, target: Array, outputs: Sequence[Array], nodes: Array
    ) -> Array:
        """The SA-Predictor and the SA-Corrector (alg. 1), from ``source`` to ``target``.

        The outputs at the levels ``nodes``, ``target`` among them for the corrector, are interpolated by a polynomial
        in lambda and integrated.
        """
        _, scale, u = exponential_step(source, target, data=self.predicts_data)
        rate, h, ratio = 1 + tau**2, abs(u), target[0] / source[0]
        if h == 0:
            return x
        offsets = [log_snr_half(level) - log_snr_half(source) for level in nodes]
        if self.predicts_data:
            p, q = ratio * np.exp(-rate * h), rate * scale
            std = target[1] * np.sqrt(-np.expm1(-2 * tau**2 * h)) if target[1] else 0.0
            weights = adams_weights([h - offset for offset in offsets], h, rate)
            if len(nodes) == 2:
                # Published samplers give the slope the weight h^2 / 2, as if the integrand were constant; that
                # differs from the paper's in the third order of h.
                weights = np.linalg.solve(np.vander(offsets, increasing=True).T, [weights.sum(), h**2 / 2])
        else:
            p, q = ratio, -rate * scale * np.exp(h)
            std = tau * scale * np.sqrt(np.expm1(2 * h))
            weights = adams_weights(offsets, h)
        return p * x + q * sum(w * m for w, m in zip(weights, outputs, strict=False)) + std * noise
