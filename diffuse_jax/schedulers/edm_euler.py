"""Euler's method for EDM networks: Karras et al. 2022 (arXiv 2206.00364), alg. 2 without its second evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from diffuse_jax.schedulers.edm import EDMScheduler
from diffuse_jax.schedulers.euler import churned_euler
from diffuse_jax.schedulers.table import Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMEulerScheduler(EDMScheduler):
    """Euler steps.

    Options of :meth:`plan`: ``s_churn``, ``s_tmin``, ``s_tmax``, ``s_noise``. The network is evaluated before the noise
    of a step is added, but its output is read as if it were evaluated after, as in published samplers.
    """

    step_options: ClassVar[tuple[str, ...]] = ("s_churn", "s_tmin", "s_tmax", "s_noise")

    def evaluations(self, grid: Grid, begin: int, **churn: float) -> Iterator[Row]:
        return churned_euler(self, grid, begin, read_raised=True, **churn)
