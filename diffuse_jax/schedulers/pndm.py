"""Pseudo numerical methods: Liu et al. 2022 (arXiv 2202.09778), the default sampler of Stable Diffusion 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from diffuse_jax.schedulers.ddim import discrete_grid
from diffuse_jax.schedulers.noise_schedule import Array, predict_eps
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.schedulers.table import Evaluation, Grid, Level, Row, transfer

ADAMS_BASHFORTH = (
    np.array([1.0]),
    np.array([3, -1]) / 2,
    np.array([23, -16, 5]) / 12,
    np.array([55, -59, 37, -9]) / 24,
)
"""Weights of the newest and the older outputs, by how many there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PNDMScheduler(Scheduler):
    """Linear multistep sampling of order 4 (PLMS).

    The first outputs that the multistep formula needs come from Runge-Kutta steps of four evaluations each, or, with
    ``skip_prk_steps``, from formulas of lower order after one Heun-like step. The linear combinations are of raw
    outputs, which are read as noise only afterwards.

    A run with ``skip_prk_steps`` that is entered late (``strength``) starts at that place of the list of evaluations,
    in which the second timestep stands twice, as published pipelines do.
    """

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        grid = discrete_grid(self, n, timesteps, sigmas)
        if not self.skip_prk_steps or n == 1:
            return grid
        # PLMS evaluates the second timestep twice: once to finish the Heun-like first step, once to leave it.
        order = np.array([0, 1, *range(1, n)])
        return Grid(grid.timesteps[order], grid.source[order], grid.target[order], stride=grid.stride)

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        if self.skip_prk_steps:
            yield from self._plms(grid, begin)
            return
        left = len(grid.timesteps) - begin
        if left < 4:
            raise ValueError(
                f"PNDMScheduler with skip_prk_steps=False needs at least 4 steps to start, {left} are to be run;"
                " use more steps or skip_prk_steps=True"
            )
        yield from self._runge_kutta(grid, begin)
        for i in range(begin + 3, len(grid.timesteps)):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            yield e.row(*self._multistep(e, e.memory[:3], grid.target[i]))

    def _plms(self, grid: Grid, begin: int) -> Iterator[Row]:
        for k, i in enumerate(range(begin, len(grid.timesteps))):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            if k != 1:
                older = e.memory[: min(3, max(0, k - 1))]
                sample, outputs = self._multistep(e, older, grid.target[i])
                yield e.row(sample, [*outputs, *[np.zeros_like(e.x)] * (4 - len(outputs)), e.x])
                continue
            # Repeat the first step from where it began with the mean of the outputs at its two ends.
            first, start = e.memory[0], e.memory[4]
            level = self._level_before(grid, i)
            sample = self._move(start, (e.output + first) / 2, level, grid.source[i])
            yield e.row(sample, [first])

    def _level_before(self, grid: Grid, i: int) -> Array:
        if grid.stride is None:
            return np.asarray(grid.source[i - 1])
        return np.asarray(self.train_levels()[min(int(grid.timesteps[i]) + grid.stride, self.num_train_timesteps - 1)])

    def _multistep(self, e: Evaluation, older: list[Array], target: Array) -> tuple[Array, list[Array]]:
        """Adams-Bashforth step from the newest and up to three older outputs; the next sample and the next memory."""
        outputs = [e.output, *older]
        mean = sum(w * m for w, m in zip(ADAMS_BASHFORTH[len(older)], outputs, strict=True))
        return self._move(e.x, mean, (e.alpha, e.sigma), target), outputs[:3]

    def _move(self, x: Array, output: Array, source: Level, target: Level) -> Array:
        return transfer(x, predict_eps(self.prediction_type, x, output, *source), source, target)

    def _runge_kutta(self, grid: Grid, begin: int) -> Iterator[Row]:
        """Three classical Runge-Kutta steps of four evaluations; memory: their first outputs, the start, the mean."""
        levels = self.train_levels()
        final = (1.0, 0.0) if self.set_alpha_to_one else levels[0]

        def level(t: float) -> Array:
            return np.asarray(levels[int(t)] if t >= 0 else final)

        for block in range(3):
            start, end = grid.timesteps[begin + block], grid.timesteps[begin + block + 1]
            half = int(start - end if grid.stride is None else grid.stride) // 2
            evaluated = (start, end + half, end + half, end)
            reached = (start - half, end + half, end, end)
            for k in range(4):
                e = self.evaluation(evaluated[k], level(evaluated[k]))
                firsts, origin, total = e.memory[:3], e.memory[3], e.memory[4]
                if k == 0:
                    firsts, origin, total = [e.output, *e.memory[:2]], e.x, np.zeros_like(e.x)
                total = total + e.output * (1 / 6, 1 / 3, 1 / 3, 1 / 6)[k]
                sample = self._move(origin, e.output if k < 3 else total, level(start), level(reached[k]))
                yield e.row(sample, [*firsts, origin, total], inner=k < 3)
