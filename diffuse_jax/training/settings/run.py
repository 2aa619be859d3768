"""Settings of a whole training run."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from diffuse_jax.bounds import COUNT, DECAY, NATURAL, NONNEGATIVE, POSITIVE, SEED, SHARE
from diffuse_jax.messages import warn
from diffuse_jax.training.checks import Checked, one_of

if TYPE_CHECKING:  # worker processes and `--help` read this module, and need no JAX for it
    from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSettings(Checked):
    """The number of images per training step.

    Attributes:
      train_batch_size: images per device and accumulation step. Devices along the mesh's ``tensor`` axis share theirs.
      gradient_accumulation_steps: number of batches whose gradients are accumulated before each update.

    Raises:
      ValueError: a value is not positive.
    """

    train_batch_size: Annotated[int, COUNT] = 16
    gradient_accumulation_steps: Annotated[int, COUNT] = 1

    def images_per_part(self, mesh: Mesh) -> int:
        """The number of images per accumulation step, over all devices of ``mesh``."""
        return self.train_batch_size * mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)

    def images_per_step(self, mesh: Mesh) -> int:
        """The number of images per training step, over all devices of ``mesh``."""
        return self.gradient_accumulation_steps * self.images_per_part(mesh)


SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
    "warmup_stable_decay",
)
"""Names of learning-rate schedules; see :func:`~diffuse_jax.training.optimizer.learning_rate`."""

SMALLEST_RATE = 2.0**-126
"""Learning rates below this are 0 on the device: the smallest normal number of float32."""

OPTIMIZERS = ("adafactor", "adamw", "lion", "muon", "prodigy")
"""Names of optimisers, the keys of :data:`diffuse_jax.training.optimizer.OPTIMIZERS`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Checked):
    """The optimiser of a run and its learning rate.

    Attributes:
      optimizer: one of :data:`OPTIMIZERS`.
      learning_rate: the peak learning rate.
      scale_lr: multiply the learning rate by the number of images per training step.
      text_encoder_lr: the peak learning rate of trained text encoders; ``learning_rate`` if None.
      lr_rules: peak learning rates of some of the parameters, each as ``"REGEX=RATE"``; see :attr:`rates`.
      lr_scheduler: one of :data:`SCHEDULES`, described at
        :func:`~diffuse_jax.training.optimizer.learning_rate`.
      lr_warmup_steps: number of training steps of linear warm-up.
      lr_num_cycles: number of cycles of ``cosine_with_restarts``.
      lr_power: exponent of ``polynomial``.
      lr_step_rules: rules of ``piecewise_constant``.
      adam_beta1, adam_beta2, adam_epsilon: decays of the two moments, and the epsilon added to the root of the second;
        None for the optimiser's defaults.
      adam_weight_decay: weight decay, multiplied by the learning rate only.
      max_grad_norm: global norm to which the gradient is clipped; None for no clipping.

    Raises:
      ValueError: the name of the optimiser or schedule is unknown, or a number is out of range.
    """

    optimizer: str = "adamw"
    learning_rate: Annotated[float, NONNEGATIVE] = 1e-4
    scale_lr: bool = False
    text_encoder_lr: Annotated[float, NONNEGATIVE] | None = None
    lr_rules: tuple[str, ...] | None = None
    lr_scheduler: str = "constant"
    lr_warmup_steps: Annotated[int, NATURAL] = 500
    lr_num_cycles: Annotated[int, COUNT] = 1
    lr_power: Annotated[float, POSITIVE] = 1.0
    lr_step_rules: str = ""
    adam_beta1: Annotated[float, DECAY] | None = None
    adam_beta2: Annotated[float, DECAY] | None = None
    adam_weight_decay: Annotated[float, NONNEGATIVE] | None = 1e-2
    adam_epsilon: Annotated[float, NONNEGATIVE] | None = None
    max_grad_norm: Annotated[float, POSITIVE] | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(OPTIMIZERS, optimizer=self.optimizer)
        one_of(SCHEDULES, lr_scheduler=self.lr_scheduler)
        for name in ("learning_rate", "text_encoder_lr"):
            if (rate := getattr(self, name)) is not None and rate < SMALLEST_RATE:
                warn(f"{name} is {rate:g}: the parameters that it applies to will not change")
        _ = self.rates  # which checks them

    @property
    def rates(self) -> dict[str, float]:
        """The peak learning rate of the parameters whose path, such as ``unet/down_blocks_0/resnets_0/conv1/kernel``,
        contains a match of the regular expression; the first that matches counts."""
        found: dict[str, float] = {}
        for rule in self.lr_rules or ():
            pattern, _, text = rule.rpartition("=")
            try:
                rate = float(text)
                re.compile(pattern)
            except (ValueError, re.error):
                rate = -1.0
            if not pattern or not 0 <= rate < math.inf:
                raise ValueError(
                    f"--lr_rules {rule!r} must be REGEX=RATE, such as 'attn2=1e-5': a regular expression and a finite "
                    "number of at least 0"
                )
            if pattern in found:
                raise ValueError(f"--lr_rules has two rates for {pattern!r}, {found[pattern]:g} and {rate:g}")
            found[pattern] = rate
        return found


def check_warmup(name: str, warmup: int, total: int) -> None:
    """Refuse a warm-up that is longer than the run, if the schedule has one.

    Raises:
      ValueError: the warm-up is not shorter than the run.
    """
    if name not in ("constant", "piecewise_constant") and not 0 <= warmup < total:
        raise ValueError(f"lr_warmup_steps {warmup} must be from 0 to less than max_train_steps {total}")


@dataclasses.dataclass(frozen=True)
class Average(Checked):
    """The decay of the running average of the parameters; see :func:`~diffuse_jax.training.state.ema_rate`.

    Attributes:
      decay: the decay that is reached after a ramp.
      min_decay: lower bound of the decay, once averaging has begun.
      update_after_step: number of training steps after which averaging begins.
      inv_gamma, power: with ``inv_gamma`` the ramp is ``1 - (1 + n / inv_gamma) ** -power`` instead of
        ``(1 + n) / (10 + n)``.
      ramp: False for ``decay`` from the first step on, so that the average begins at the initial parameters.
    """

    decay: Annotated[float, SHARE] = 0.9999
    min_decay: Annotated[float, SHARE] = 0.0
    update_after_step: Annotated[int, NATURAL] = 0
    inv_gamma: Annotated[float, POSITIVE] | None = None
    power: Annotated[float, POSITIVE] = 2 / 3
    ramp: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaSettings(Checked):
    """Whether the parameters are averaged, and how.

    Attributes:
      use_ema: keep a running average of the parameters; save and validate the average.
      ema_decay, ema_inv_gamma, ema_power, ema_ramp: see :class:`Average`.

    Raises:
      ValueError: the decay is not in [0, 1].
    """

    use_ema: bool = False
    ema_decay: Annotated[float, SHARE] = 0.9999
    ema_inv_gamma: Annotated[float, POSITIVE] | None = None
    ema_power: Annotated[float, POSITIVE] = 2 / 3
    ema_ramp: bool = True

    @property
    def average(self) -> Average:
        """The settings of the average, in the form that the training step takes."""
        return Average(decay=self.ema_decay, inv_gamma=self.ema_inv_gamma, power=self.ema_power, ramp=self.ema_ramp)


TRACKERS = ("tensorboard", "wandb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackerSettings(Checked):
    """Where records and validation images are logged, besides ``log.jsonl`` and ``validation/``.

    Attributes:
      report_to: one of :data:`TRACKERS`, "all" or "none"; if None, TensorBoard if it is installed.
      logging_dir: folder for the files of TensorBoard and W&B, inside the folder of the run.
      tracker_project_name: project on Weights & Biases.
      wandb_entity: user or team on Weights & Biases; the user who is logged in if None.
      plot: draw the curves of loss and learning rate when the run ends; needs matplotlib.

    Raises:
      ValueError: the tracker is unknown.
    """

    report_to: str | None = None
    logging_dir: str | Path = "logs"
    tracker_project_name: str = "diffuse-jax"
    wandb_entity: str | None = None
    plot: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of((*TRACKERS, "none", "all"), report_to=self.report_to)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileSettings(Checked):
    """Which parts of a run are profiled.

    Attributes:
      profile_steps: profile this many training steps, beginning with the second.
      profile_validation: profile the last validation.
      profile_memory: write memory profiles before the first and after the last step.

    Raises:
      ValueError: the number of steps is negative.
    """

    profile_steps: Annotated[int, NATURAL] = 0
    profile_validation: bool = False
    profile_memory: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class UploadSettings(Checked):
    """Whether and where the trained model is uploaded to the Hub.

    Attributes:
      push_to_hub: upload the folder of the run at the end.
      hub_model_id: name of the repository; the name of the folder if None.
      hub_private_repo: make the repository private.
      hub_token: access token; the one stored by `hf auth login` if None.
    """

    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool = False
    hub_token: str | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(Checked):
    """The length of a run, what it writes and when, and the checkpoint it resumes from.

    These are the settings of :func:`~diffuse_jax.training.loop.fit`.

    Attributes:
      output_dir: folder for checkpoints, logs and the trained model; all processes must be able to access it.
      overwrite_output_dir: remove the checkpoints of an older run from ``output_dir``.
      dry_run: check everything, compile, take two steps on real data, say what the run would need, and end; see
        :mod:`~diffuse_jax.training.rehearsal`.
      seed: determines the noise, the timesteps and all other random numbers of the loss.
      max_train_steps: total number of training steps, also when resuming; overrides ``num_train_epochs``.
      num_train_epochs: number of passes over the data set.
      checkpointing_steps: write ``checkpoint-N`` every this many steps.
      checkpoints_total_limit: keep at most this many checkpoints, the newest; all if None.
      resume_from_checkpoint: "latest", the name of a checkpoint in ``output_dir``, or a path; a new run if None.
      logging_steps: log every this many steps.
      validation_steps: validate every this many steps; 100 if both this and ``validation_epochs`` are None.
      validation_epochs: validate every this many epochs.
      peak_tflops: peak speed of a device, for the FLOPs utilisation; known for TPUs and many GPUs.
      batch: the number of images per training step.
      optimizer: the optimiser and its learning rate.
      ema: the running average of the parameters.
      trackers: where records are logged.
      profile: which parts of the run are profiled.
      upload: whether the trained model is uploaded to the Hub.

    Raises:
      ValueError: a number is out of range, or the warm-up is longer than the run.
    """

    output_dir: str | Path
    overwrite_output_dir: bool = False
    dry_run: bool = False
    seed: Annotated[int, SEED] = 0
    max_train_steps: Annotated[int, COUNT] | None = None
    num_train_epochs: Annotated[int, COUNT] = 100
    checkpointing_steps: Annotated[int, COUNT] = 500
    checkpoints_total_limit: Annotated[int, COUNT] | None = None
    resume_from_checkpoint: str | Path | None = None
    logging_steps: Annotated[int, COUNT] = 50
    validation_steps: Annotated[int, COUNT] | None = None
    validation_epochs: Annotated[int, COUNT] | None = None
    peak_tflops: Annotated[float, POSITIVE] | None = None
    batch: BatchSettings = field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    ema: EmaSettings = field(default_factory=EmaSettings)
    trackers: TrackerSettings = field(default_factory=TrackerSettings)
    profile: ProfileSettings = field(default_factory=ProfileSettings)
    upload: UploadSettings = field(default_factory=UploadSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_train_steps is not None:  # otherwise the length is known only with the data
            check_warmup(self.optimizer.lr_scheduler, self.optimizer.lr_warmup_steps, self.max_train_steps)
