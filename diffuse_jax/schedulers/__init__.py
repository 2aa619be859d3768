"""Samplers: frozen configurations that turn a number of steps into a table that one ``step`` function executes."""

from diffuse_jax.schedulers.base import Scheduler
from diffuse_jax.schedulers.ddim import DDIMScheduler
from diffuse_jax.schedulers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

__all__ = [
    "DDIMScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "Scheduler",
]
