"""DPM-Solver++ multistep (Lu et al. 2022, arXiv 2211.01095) for EDM networks and those of the cosine schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.dpm_solver import DPMSolverMultistepScheduler
from diffuse_jax.schedulers.edm import EDMScheduler
from diffuse_jax.schedulers.table import Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMDPMSolverMultistepScheduler(EDMScheduler, DPMSolverMultistepScheduler):  # type: ignore[misc]  # no mu
    """The update of :class:`DPMSolverMultistepScheduler` between the levels of EDM."""

    absent: ClassVar[tuple[str, ...]] = (
        *EDMScheduler.absent,
        "lambda_min_clipped",
        "variance_type",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "use_lu_lambdas",
        "use_flow_sigmas",
        "flow_shift",
        "use_dynamic_shifting",
        "time_shift_type",
        "rescale_betas_zero_snr",
    )
    grid_options: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[dict[str, tuple[Any, ...]]] = (
        DPMSolverMultistepScheduler.choices
        | EDMScheduler.choices
        | {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++")}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineDPMSolverMultistepScheduler(EDMDPMSolverMultistepScheduler):
    """SDE-DPM-Solver++ whose noise is one Brownian path for each image (Stable Audio).

    The network's time is ``2 / pi * atan(sigma)``, that of the cosine schedule. The key of ``plan.step`` chooses the
    path, which runs of more steps follow too.
    """

    sigma_min: float = 0.3
    sigma_max: float = 500.0
    sigma_data: float = 1.0  # type: ignore[misc]
    sigma_schedule: str = "exponential"
    prediction_type: str = "v_prediction"
    algorithm_type: str = "sde-dpmsolver++"

    absent: ClassVar[tuple[str, ...]] = (
        *EDMDPMSolverMultistepScheduler.absent,
        "algorithm_type",
        "thresholding",
        "dynamic_thresholding_ratio",
        "sample_max_value",
    )
    choices: ClassVar[dict[str, tuple[Any, ...]]] = EDMDPMSolverMultistepScheduler.choices | {"solver_order": (1, 2)}

    def timestep(self, sigma: Any, xp: Any = np) -> Any:
        return xp.asarray(xp.arctan(sigma) * 2 / np.pi)

    def level(self, t: Any, xp: Any = np) -> tuple[Any, Any]:
        return xp.ones_like(t), xp.tan(np.pi / 2 * t)

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        for row, target in zip(super().evaluations(grid, begin), grid.target[begin:], strict=True):
            yield dataclasses.replace(row, interval=sg.path_interval(row.evaluation.sigma, target[1]))
