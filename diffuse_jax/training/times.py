"""Distributions of the random times of training in continuous time, for EDM and for flow matching."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from diffuse_jax.bounds import FINITE, MODE_SCALE, POSITIVE
from diffuse_jax.schedulers.edm import EDMScheduler
from diffuse_jax.schedulers.flow import shift
from diffuse_jax.schedulers.flow_match import FlowMatchScheduler
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.training.checks import Checked


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogNormalLevels(Checked):
    """Noise levels whose logarithm is normal (Karras et al. 2022, arXiv 2206.00364, table 1).

    Attributes:
      mean, std: of the logarithm, ``P_mean`` and ``P_std`` of the paper.
    """

    schedulers: ClassVar[type[Scheduler]] = EDMScheduler

    mean: Annotated[float, FINITE] = -1.2
    std: Annotated[float, POSITIVE] = 1.2

    def __call__(self, scheduler: Scheduler, key: jax.Array, count: int) -> jax.Array:
        """Timesteps float32 ``[count]``."""
        assert isinstance(scheduler, EDMScheduler)
        log_sigma = self.mean + self.std * jax.random.normal(key, (count,), jnp.float32)
        return scheduler.timestep(jnp.exp(log_sigma), jnp)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformTimes(Checked):
    """Levels of flow matching that are uniform before the scheduler's shift."""

    schedulers: ClassVar[type[Scheduler]] = FlowMatchScheduler

    def __call__(self, scheduler: Scheduler, key: jax.Array, count: int) -> jax.Array:
        """Timesteps float32 ``[count]``."""
        assert isinstance(scheduler, FlowMatchScheduler)
        sigma = self.levels(key, count)
        return shift(sigma, scheduler.shift, jnp) * scheduler.num_train_timesteps

    def levels(self, key: jax.Array, count: int) -> jax.Array:
        """Levels in [0, 1] before the shift, float32 ``[count]``."""
        return jax.random.uniform(key, (count,), jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitNormalTimes(UniformTimes):
    """Levels that are the sigmoid of normal numbers (Esser et al. 2024, arXiv 2403.03206, eq. 19).

    Attributes:
      mean, std: of these numbers; a positive mean favours noise.
    """

    mean: Annotated[float, FINITE] = 0.0
    std: Annotated[float, POSITIVE] = 1.0

    def levels(self, key: jax.Array, count: int) -> jax.Array:
        return jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (count,), jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModeTimes(UniformTimes):
    """Levels around the middle, or with a negative scale at the ends, that include both ends; see :func:`mode`.

    Attributes:
      scale: ``s`` of :func:`mode`.
    """

    scale: Annotated[float, MODE_SCALE] = 1.29

    def levels(self, key: jax.Array, count: int) -> jax.Array:
        return mode(super().levels(key, count), self.scale)


def mode(u: jax.Array, s: float) -> jax.Array:
    """A monotonic map of [0, 1] onto itself, flatter in the middle for larger ``s`` (Esser et al. 2024, eq. 20)."""
    return 1 - u - s * (jnp.square(jnp.cos(jnp.pi / 2 * u)) - 1 + u)


Times: TypeAlias = LogNormalLevels | UniformTimes
"""How :func:`~diffuse_jax.training.objective.draw` chooses timesteps."""
