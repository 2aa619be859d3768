"""UniPC, a predictor-corrector for few steps: Zhao et al. 2023 (arXiv 2302.04867)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from math import factorial
from typing import Annotated, Any, ClassVar

import numpy as np

from diffuse_jax.allowed import Index, Length
from diffuse_jax.schedulers import flow
from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.exponential import ExponentialIntegrator
from diffuse_jax.schedulers.multistep import exponential_step, log_snr_half
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.schedulers.table import MEMORY, WIDTH, Evaluation, Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniPCMultistepScheduler(ExponentialIntegrator):
    """Unified predictor-corrector of order 1 to 3; one evaluation per step serves the corrector and the predictor.

    ``solver_type`` is the paper's B(h): ``bh1`` is h, ``bh2`` is exp(h) - 1. ``disable_corrector`` lists the steps
    after which nothing is corrected, useful at large guidance scales.

    Options of :meth:`plan`: ``solver_p``, a sampler whose steps serve as the predictor; ``mu`` (dynamic shift).
    """

    solver_order: int = 2
    predict_x0: bool = True
    solver_type: str = "bh2"
    lower_order_final: bool = True
    disable_corrector: Annotated[tuple[Index, ...], Length(65_536)] = ()
    solver_p: None = None
    final_sigmas_type: str = "zero"
    rescale_betas_zero_snr: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    sigma_min: float | None = None
    sigma_max: float | None = None
    shift_terminal: float | None = None

    grid_options: ClassVar[tuple[str, ...]] = ("mu", "as_published")
    step_options: ClassVar[tuple[str, ...]] = ("solver_p",)
    karras_flow: ClassVar[bool] = True
    choices: ClassVar[dict[str, tuple[Any, ...]]] = ExponentialIntegrator.choices | {
        "solver_order": (1, 2, 3),
        "solver_type": ("bh1", "bh2"),
        "final_sigmas_type": sg.FINAL_SIGMAS,
        "time_shift_type": flow.SHIFT_TYPES,
    }
    aliases: ClassVar[dict[str, dict[str, str]]] = {
        "solver_type": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver_p is not None:
            raise ValueError(f"solver_p must be None, got {self.solver_p!r}; give plan(..., solver_p=) instead")
        if self.final_sigmas_type == "zero" and not self.predict_x0:
            raise ValueError("predict_x0=False cannot step to a clean sample; set final_sigmas_type='sigma_min'")
        if self.final_sigmas_type == "zero" and not self.lower_order_final and self.solver_order > 1:
            raise ValueError(
                "the last step goes to a clean sample, which only order 1 can do; set lower_order_final=True or"
                " final_sigmas_type='sigma_min'"
            )

    def flow_points(self, n: int) -> Array:
        return np.linspace(1, 1 / self.num_train_timesteps, n + 1)[:-1]

    def evaluations(self, grid: Grid, begin: int, solver_p: Scheduler | None = None) -> Iterator[Row]:
        n, order, most = len(grid.timesteps), 0, self.solver_order
        predictor = None if solver_p is None else _Predictor(self, solver_p, grid, begin)
        for i in range(begin, n):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            newest = self.newest_output(e, data=self.predict_x0)
            older, previous, others = e.memory[:most], e.memory[most], e.memory[most + 1 :]
            x = e.x
            if i > begin and i - 1 not in self.disable_corrector:
                levels = [grid.source[i], *grid.source[i - order : i][::-1]]
                x = self._update(previous, older, levels, corrector=newest)
            order = min(most, n - i if self.lower_order_final else n, i - begin + 1)
            order = 1 if grid.target[i, 1] == 0 else order
            outputs = [newest, *older]
            levels = [grid.target[i], *grid.source[i - order + 1 : i + 1][::-1]]
            if predictor is None:
                yield e.row(self._update(x, outputs, levels), [*outputs[:most], x])
            else:
                after, remembered = predictor.step(i - begin, e, x, others)
                yield e.row(after, [*outputs[:most], x, *remembered])

    def _update(self, x: Array, m: Sequence[Array], levels: Sequence[Array], corrector: Array | None = None) -> Array:
        """A step of order ``len(levels) - 1`` from ``x`` (alg. 1 and 2 of the paper, B(h) version).

        ``m`` and ``levels`` run backwards from the newest; ``levels[0]`` is where the step goes and ``corrector`` the
        output there, if it is known.
        """
        order = len(levels) - 1
        p, q, u = exponential_step(levels[1], levels[0], data=self.predict_x0)
        base = p * x - q * np.expm1(u) * m[0]
        if u == 0 or (order == 1 and corrector is None):
            return base
        lambdas = [log_snr_half(level) for level in levels]
        nodes = [(lam - lambdas[1]) / (lambdas[0] - lambdas[1]) for lam in lambdas[2:]]
        slopes = [(older - m[0]) / r for older, r in zip(m[1:], nodes, strict=False)]
        if corrector is not None:
            nodes, slopes = [*nodes, 1.0], [*slopes, corrector - m[0]]
        scale = u if self.solver_type == "bh1" else np.expm1(u)
        weights = [0.5] if len(nodes) == 1 else _weights(nodes, u, scale)
        return base - q * scale * sum(w * slope for w, slope in zip(weights, slopes, strict=True))


class _Predictor:
    """Another sampler's rows for the levels of a grid, remembering tensors in the slots that UniPC leaves free."""

    def __init__(self, owner: UniPCMultistepScheduler, scheduler: Scheduler, grid: Grid, begin: int) -> None:
        name, room = type(scheduler).__name__, MEMORY - owner.solver_order - 1
        if not isinstance(scheduler, ExponentialIntegrator) or scheduler.ascends:
            raise ValueError(f"solver_p must be a multistep sampler such as DPMSolverMultistepScheduler, got {name}")
        for setting in ("prediction_type", "coordinates"):
            ours, theirs = getattr(owner, setting), getattr(scheduler, setting)
            if ours != theirs:
                raise ValueError(f"solver_p={name} has {setting} {theirs!r}, the corrector {ours!r}; they must agree")
        if scheduler.corrects_x0:
            raise ValueError(f"solver_p={name} clips or thresholds clean samples itself; set thresholding=False")
        self.rows = [row.coefficients for row in scheduler.evaluations(grid, begin)]
        reads = np.any(self.rows, axis=0)[:, 3 : 3 + MEMORY]
        needed = reads[0]
        for _ in range(MEMORY):
            needed = needed | reads[1:][needed].any(axis=0)
        self.kept = np.flatnonzero(needed)
        if len(self.kept) > room:
            raise ValueError(
                f"solver_p={name} remembers {len(self.kept)} tensors, beside solver_order={owner.solver_order} there is"
                f" room for {room}; lower one of the orders"
            )

    def step(self, k: int, e: Evaluation, x: Array, memory: Sequence[Array]) -> tuple[Array, list[Array]]:
        """The ``k``-th step of the run, from ``x``; the next sample and what is to be remembered."""
        remembered = np.zeros((MEMORY, WIDTH))
        for place, tensor in zip(self.kept, memory, strict=False):
            remembered[place] = tensor
        after = self.rows[k] @ np.stack([x, e.x0, e.output, *remembered, e.noise])
        return after[0], [after[1 + j] for j in self.kept]


def _weights(nodes: Sequence[float], u: float, scale: float) -> Array:
    """Solve ``sum_k weights[k] * nodes[k]^(j-1) = j! * u * phi_(j+1)(u) / scale`` for j = 1, 2, ... (theorem 3.1)."""
    rhs, phi = [], np.expm1(u)
    for j in range(1, len(nodes) + 1):
        phi = phi / u - 1 / factorial(j)
        rhs.append(phi * factorial(j) / scale)
    return np.linalg.solve(np.vander(nodes, increasing=True).T, np.array(rhs))
