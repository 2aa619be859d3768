"""Samplers: frozen configurations that turn a number of steps into a table that one ``step`` function executes."""

from diffuse_jax.schedulers.ays import AYS as AYS
from diffuse_jax.schedulers.configuration import scheduler_class
from diffuse_jax.schedulers.consistency_decoder import ConsistencyDecoderScheduler
from diffuse_jax.schedulers.consistency_models import CMStochasticIterativeScheduler
from diffuse_jax.schedulers.ddim import DDIMParallelScheduler, DDIMScheduler
from diffuse_jax.schedulers.ddim_inverse import DDIMInverseScheduler
from diffuse_jax.schedulers.ddpm import DDPMParallelScheduler, DDPMScheduler
from diffuse_jax.schedulers.ddpm_wuerstchen import DDPMWuerstchenScheduler
from diffuse_jax.schedulers.deis import DEISMultistepScheduler
from diffuse_jax.schedulers.dpm_solver import DPMSolverMultistepScheduler
from diffuse_jax.schedulers.dpm_solver_inverse import DPMSolverMultistepInverseScheduler
from diffuse_jax.schedulers.dpm_solver_sde import DPMSolverSDEScheduler
from diffuse_jax.schedulers.dpm_solver_singlestep import DPMSolverSinglestepScheduler
from diffuse_jax.schedulers.edm_dpm_solver import CosineDPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler
from diffuse_jax.schedulers.edm_euler import EDMEulerScheduler
from diffuse_jax.schedulers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from diffuse_jax.schedulers.flow_match import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from diffuse_jax.schedulers.heun import HeunDiscreteScheduler
from diffuse_jax.schedulers.ipndm import IPNDMScheduler
from diffuse_jax.schedulers.karras_edm import KarrasEDMScheduler
from diffuse_jax.schedulers.karras_ve import KarrasVeScheduler
from diffuse_jax.schedulers.kdpm2 import KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler
from diffuse_jax.schedulers.lcm import LCMScheduler
from diffuse_jax.schedulers.lms import LMSDiscreteScheduler
from diffuse_jax.schedulers.pndm import PNDMScheduler
from diffuse_jax.schedulers.repaint import RePaintScheduler
from diffuse_jax.schedulers.sa_solver import SASolverScheduler
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.schedulers.score_sde_ve import ScoreSdeVeScheduler
from diffuse_jax.schedulers.score_sde_vp import ScoreSdeVpScheduler
from diffuse_jax.schedulers.tcd import TCDScheduler
from diffuse_jax.schedulers.unclip import UnCLIPScheduler
from diffuse_jax.schedulers.unipc import UniPCMultistepScheduler
from diffuse_jax.schedulers.vq_diffusion import VQDiffusionScheduler

__all__ = [
    "CMStochasticIterativeScheduler",
    "ConsistencyDecoderScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DDPMWuerstchenScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KarrasDiffusionSchedulers",
    "KarrasEDMScheduler",
    "KarrasVeScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "RePaintScheduler",
    "SASolverScheduler",
    "Scheduler",
    "ScoreSdeVeScheduler",
    "ScoreSdeVpScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
    "VQDiffusionScheduler",
    "scheduler_class",
]

KarrasDiffusionSchedulers: tuple[type[Scheduler], ...] = (
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    LMSDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    KDPM2DiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    DEISMultistepScheduler,
    UniPCMultistepScheduler,
    DPMSolverSDEScheduler,
    EDMEulerScheduler,
)
"""The interchangeable samplers: each takes the configuration of every other one (``X.from_config(other)``)."""
