"""What one comparison of a sampler with PyTorch is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Stable Diffusion's training schedule."""

TRAINED_BETAS = tuple(float(b) for b in np.linspace(0.02, 0.12, 1000) ** 2 * 0.8 + 2e-4)
"""As a network with bounded betas would have been trained, but unlike every named schedule."""

STEPS = (1, 2, 3, 5, 10, 20, 50, 999)


@dataclasses.dataclass
class Theirs:
    """A run of PyTorch diffusers.

    Attributes:
      scheduler: after ``set_timesteps``.
      timesteps: those to run.
      network: ``network(scaled_sample, timestep)``.
      start: the first sample.
      noise: one draw for each evaluation of this library's table, and more.
      drawn: what diffusers gets when it draws: a tensor, again and again, or an iterator over tensors.
    """

    scheduler: Any
    timesteps: Any
    network: Callable[[Any, Any], Any]
    start: Any
    noise: Any
    drawn: Any = None

    def draw(self, *_: Any, **__: Any) -> Any:
        """In place of ``randn_tensor``."""
        return next(self.drawn) if isinstance(self.drawn, Iterator) else self.drawn


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of one scheduler: ``config`` of both sides, ``plan`` options here, ``step`` options there.

    Attributes:
      loop: how diffusers is driven where that is more than ``scheduler.step`` at every timestep: gets a :class:`Theirs`
        and returns the samples, the first one included.
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
