"""What one comparison of a sampler with PyTorch is."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Stable Diffusion's training schedule."""

TRAINED_BETAS = tuple(float(b) for b in np.linspace(0.02, 0.12, 1000) ** 2 * 0.8 + 2e-4)
"""As a network with bounded betas would have been trained, but unlike every named schedule."""

STEPS = (1, 2, 3, 5, 10, 20, 50, 999)


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of one scheduler: ``config`` of both sides, ``plan`` options here, ``step`` options there."""

    scheduler: str
    label: str
    config: dict[str, Any]
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)
    step: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: tuple[int, ...] = STEPS

    def __str__(self) -> str:
        return f"{self.scheduler.removesuffix('Scheduler')}-{self.label}"
