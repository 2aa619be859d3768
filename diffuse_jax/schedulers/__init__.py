"""Samplers: frozen configurations that turn a number of steps into a table that one ``step`` function executes."""

from diffuse_jax.schedulers.base import Scheduler
from diffuse_jax.schedulers.ddim import DDIMScheduler
from diffuse_jax.schedulers.ddpm import DDPMScheduler
from diffuse_jax.schedulers.deis import DEISMultistepScheduler
from diffuse_jax.schedulers.dpm_solver import DPMSolverMultistepScheduler
from diffuse_jax.schedulers.dpm_solver_inverse import DPMSolverMultistepInverseScheduler
from diffuse_jax.schedulers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from diffuse_jax.schedulers.lcm import LCMScheduler
from diffuse_jax.schedulers.pndm import PNDMScheduler
from diffuse_jax.schedulers.unipc import UniPCMultistepScheduler

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "Scheduler",
    "UniPCMultistepScheduler",
]
