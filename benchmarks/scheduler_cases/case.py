"""One comparison of a sampler with PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Stable Diffusion's training schedule."""

TRAINED_BETAS = tuple(float(b) for b in np.linspace(0.02, 0.12, 1000) ** 2 * 0.8 + 2e-4)
"""Plausible bounded betas that differ from every named schedule."""

STEPS = (1, 2, 3, 5, 10, 20, 50, 999)


@dataclasses.dataclass
class Theirs:
    """A run of PyTorch diffusers.

    Attributes:
      scheduler: after ``set_timesteps``.
      timesteps: the timesteps to run.
      network: ``network(scaled_sample, timestep)``.
      start: the first sample.
      noise: noise for each evaluation of this library's table, and more.
      drawn: what diffusers gets as noise: always the same tensor, or the next of an iterator over tensors.
    """

    scheduler: Any
    timesteps: Any
    network: Callable[[Any, Any], Any]
    start: Any
    noise: Any
    drawn: Any = None

    def draw(self, *_: Any, **__: Any) -> Any:
        """Replaces ``randn_tensor``."""
        return next(self.drawn) if isinstance(self.drawn, Iterator) else self.drawn


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of one scheduler: ``config`` for both sides, ``plan`` options here, ``step`` options there.

    Attributes:
      loop: how to run diffusers if it takes more than ``scheduler.step`` at every timestep: takes a :class:`Theirs` and
        returns the samples, including the first one.
    """

    scheduler: str
    label: str
    config: dict[str, Any]
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)
    step: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: tuple[int, ...] = STEPS
    loop: Callable[[Theirs], list[Any]] | None = None

    def __str__(self) -> str:
        return f"{self.scheduler.removesuffix('Scheduler')}-{self.label}"
