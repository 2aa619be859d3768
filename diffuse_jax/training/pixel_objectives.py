"""The objectives of unconditional training: DDPM (Ho et al. 2020, arXiv 2006.11239), EDM (Karras et al. 2022, arXiv
2206.00364) and flow matching (Liu et al. 2023, arXiv 2209.03003; Esser et al. 2024, arXiv 2403.03206)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffuse_jax.pipelines import ConsistencyModelPipeline, DDPMPipeline
from diffuse_jax.schedulers import (
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    Scheduler,
)
from diffuse_jax.schedulers.continuous import ContinuousScheduler
from diffuse_jax.schedulers.edm import EDMScheduler
from diffuse_jax.schedulers.flow_match import FlowMatchScheduler
from diffuse_jax.training.networks import network_folder
from diffuse_jax.training.objective import Objective, objective_from
from diffuse_jax.training.settings import EdmSettings, FlowSettings, NetworkSettings, ObjectiveSettings
from diffuse_jax.training.times import LogitNormalTimes, LogNormalLevels, ModeTimes, UniformTimes


@dataclasses.dataclass(frozen=True)
class Kind:
    """An objective of the trainer.

    Attributes:
      scheduler: the sampler of a new model, in whose terms it is trained.
      samplers: the base of the samplers of its models; None if none of the others'.
      pipeline: the class of the folder, whose loop in diffusers samples with such schedulers.
      steps: sampling steps of validation images.
    """

    scheduler: Scheduler
    samplers: type[Scheduler] | None = None
    pipeline: type[DDPMPipeline] = DDPMPipeline
    steps: int = 50


KINDS: Mapping[str, Kind] = {
    "ddpm": Kind(DDPMScheduler(), steps=1000),
    # The loop of diffusers' DDPMPipeline scales neither the noise nor the network's input; this one does.
    "edm": Kind(EDMEulerScheduler(), EDMScheduler, ConsistencyModelPipeline),
    "flow_matching": Kind(FlowMatchEulerDiscreteScheduler(), FlowMatchScheduler),
}
"""Value of ``--objective`` -> what is trained."""


def scheduler_of(kind: str, network: NetworkSettings, changes: Mapping[str, Any]) -> Scheduler:
    """The scheduler of the pretrained pipeline, if there is one, otherwise that of a new model.

    Args:
      kind: one of :data:`KINDS`.
      network: where the network comes from.
      changes: fields of the scheduler -> values; those that are None are left as they are.

    Raises:
      ValueError: the pipeline was trained with another objective, or its levels depend on the size of the image.
    """
    found, source = KINDS[kind].scheduler, network.pretrained_model_name_or_path
    if source is not None:
        folder = network_folder(network.hub, source, "scheduler", only_small=True)
        if (folder / "scheduler_config.json").is_file():
            found = Scheduler.from_pretrained(folder)
            if (own := kind_of(found)) != kind:
                raise ValueError(
                    f"{source} has a {type(found).__name__}: give --objective {own}, or, to start --objective {kind} "
                    "from its weights, the path of its unet folder"
                )
            if kind == "ddpm":
                if isinstance(found, ContinuousScheduler):
                    raise ValueError(f"{source} has a {type(found).__name__}, whose networks are not trained here; to "
                                     "start from its weights, give the path of its unet folder")  # fmt: skip
                found = DDPMScheduler.from_config(found)
    for name in ("use_dynamic_shifting", "invert_sigmas"):
        if getattr(found, name, False):
            raise ValueError(f"{source} has a {type(found).__name__} with {name}=true, which is not trained here; set "
                             "it to false in its scheduler_config.json")  # fmt: skip
    return found.replace(**{name: value for name, value in changes.items() if value is not None})


def check_resumed(checkpoint: Path | None, scheduler: Scheduler, flags: Mapping[str, str]) -> None:
    """Check that a run continues with what its network has learned to predict.

    Args:
      checkpoint: the folder that is resumed; None for a new run.
      scheduler: that of this run.
      flags: fields of the scheduler -> the flags that set them.

    Raises:
      ValueError: the checkpoint has another objective, or other values of these fields.
    """
    if checkpoint is None or not (checkpoint / "scheduler" / "scheduler_config.json").is_file():
        return
    found = Scheduler.from_pretrained(checkpoint / "scheduler")
    pairs: dict[str, tuple[Any, Any]] = {"--objective": (kind_of(found), kind_of(scheduler))}
    pairs |= {flag: (getattr(found, name, None), getattr(scheduler, name, None)) for name, flag in flags.items()}
    for flag, (old, new) in pairs.items():
        if old != new:
            raise ValueError(f"{checkpoint} was trained with {flag} {old}, got {new}; resume it with {flag} {old}")


def kind_of(scheduler: Scheduler) -> str:
    """The objective that trains the networks of a sampler."""
    bases = {name: own.samplers for name, own in KINDS.items() if own.samplers is not None}
    return next((name for name, base in bases.items() if isinstance(scheduler, base)), "ddpm")


def pixel_objective(
    scheduler: Scheduler, settings: ObjectiveSettings, edm: EdmSettings, flow: FlowSettings
) -> Objective:
    """The loss of a network that a sampler samples.

    With DDPM, the error of a sample prediction is weighted like the equivalent noise's.

    Raises:
      ValueError: the biased timesteps are not within those of the scheduler.
    """
    objective = objective_from(settings, scheduler)
    match kind_of(scheduler):
        case "edm":
            return dataclasses.replace(objective, times=LogNormalLevels(mean=edm.p_mean, std=edm.p_std))
        case "flow_matching":
            scheme = flow.weighting_scheme
            # diffusers' scripts read these numbers as places in a list that begins with pure noise.
            normal = LogitNormalTimes(mean=-flow.logit_mean, std=flow.logit_std)
            times = {"logit_normal": normal, "mode": ModeTimes(scale=flow.mode_scale)}.get(scheme, UniformTimes())
            weighting = scheme if scheme in ("sigma_sqrt", "cosmap") else None
            return dataclasses.replace(objective, times=times, flow_weighting=weighting)
    return dataclasses.replace(objective, snr_weighting=scheduler.prediction_type == "sample")
