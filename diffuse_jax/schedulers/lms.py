"""Linear multistep (Adams-Bashforth) on the probability-flow ODE in sigma: Crowson 2022, 'k-diffusion', LMS.

The ODE is that of Karras et al. 2022 (arXiv 2206.00364), eq. 3; its slope is extrapolated by the polynomial through the
last few slopes, at levels that are not equally spaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.euler import exploding_grid
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.schedulers.table import MEMORY, Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMSDiscreteScheduler(Scheduler):
    """Multistep method of order 4; the first steps use a lower order, as far as there are earlier slopes.

    Samples are ``x0 + sigma * eps``. Options of :meth:`plan`: ``order``, 1 to 6, and ``as_published``. A run that is
    entered late (``strength``) has no slopes of the steps before. As in diffusers, its first steps then leave out the
    terms of a formula of full order that need them; with ``as_published=True`` their order is lower instead.
    """

    timestep_spacing: str = "linspace"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False

    coordinates: ClassVar[str] = "exploding"
    step_options: ClassVar[tuple[str, ...]] = ("order", "as_published")

    def __post_init__(self) -> None:
        super().__post_init__()
        sg.sigma_spacing(self)

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        return exploding_grid(self, n, timesteps, sigmas)

    def evaluations(self, grid: Grid, begin: int, order: int = 4, as_published: bool = False) -> Iterator[Row]:
        if order not in range(1, MEMORY + 2):
            raise ValueError(f"order must be a whole number from 1 to {MEMORY + 1}, got {order!r}")
        for i in range(begin, len(grid.timesteps)):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            nodes = min(order, i + 1 - (begin if as_published else 0))
            slopes = [(e.x - e.x0) / e.sigma, *e.memory[: min(order, i - begin + 1) - 1]]
            weights = lagrange_integrals(grid.source[i + 1 - nodes : i + 1, 1][::-1], grid.target[i, 1])
            step = sum((w * slope for w, slope in zip(weights, slopes, strict=False)), np.zeros_like(e.x))
            yield e.row(e.x + step, memory=slopes[:MEMORY])


def lagrange_integrals(nodes: Array, end: float) -> Array:
    """Integrals from ``nodes[0]`` to ``end`` of the Lagrange polynomials of the ``nodes``.

    By Gauss-Legendre quadrature, which is exact for polynomials of degree ``2 * points - 1``.
    """
    points, weights = np.polynomial.legendre.leggauss((len(nodes) + 1) // 2)
    at = nodes[0] + (end - nodes[0]) * (points + 1) / 2
    others = [np.delete(nodes, k) for k in range(len(nodes))]
    basis = [np.prod((at[:, None] - o) / (node - o), axis=1) for node, o in zip(nodes, others, strict=True)]
    return np.array(basis) @ weights * (end - nodes[0]) / 2
