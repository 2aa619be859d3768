"""The settings of a whole training run."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path

from diffuse_jax.training.batches import BatchSettings
from diffuse_jax.training.checks import at_least
from diffuse_jax.training.optimizer import OptimizerSettings, check_warmup
from diffuse_jax.training.profiling import ProfileSettings
from diffuse_jax.training.state import EmaSettings
from diffuse_jax.training.trackers import TrackerSettings
from diffuse_jax.training.upload import UploadSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How long a run is, what it writes and when, and where it goes on.

    This is what :func:`~diffuse_jax.training.loop.fit` reads.

    Attributes:
      output_dir: where checkpoints, logs and the trained model go; all processes must see it.
      overwrite_output_dir: remove the checkpoints of an older run from it.
      seed: decides noise, timesteps and whatever else the loss draws.
      max_train_steps: training steps in all, also when resuming; wins over ``num_train_epochs``.
      num_train_epochs: how often every example is seen.
      checkpointing_steps: write ``checkpoint-N`` every so many steps.
      checkpoints_total_limit: keep at most this many checkpoints, the newest; all if None.
      resume_from_checkpoint: "latest", the name of a checkpoint in ``output_dir``, or a path; a new run if None.
      logging_steps: write a record every so many steps.
      validation_steps: validate every so many steps; 100 if both this and ``validation_epochs`` are None.
      validation_epochs: or every so many epochs.
      peak_tflops: what a device could do, for the utilisation; known for TPUs and many GPUs.
      batch: how many images a step sees.
      optimizer: how parameters are updated.
      ema: the running average of the parameters.
      trackers: where records go.
      profile: what is traced.
      upload: whether the result goes to the Hub.

    Raises:
      ValueError: a count is not positive, or the warm-up is longer than the run.
    """

    output_dir: str | Path
    overwrite_output_dir: bool = False
    seed: int = 0
    max_train_steps: int | None = None
    num_train_epochs: int = 100
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | Path | None = None
    logging_steps: int = 50
    validation_steps: int | None = None
    validation_epochs: int | None = None
    peak_tflops: float | None = None
    batch: BatchSettings = field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    ema: EmaSettings = field(default_factory=EmaSettings)
    trackers: TrackerSettings = field(default_factory=TrackerSettings)
    profile: ProfileSettings = field(default_factory=ProfileSettings)
    upload: UploadSettings = field(default_factory=UploadSettings)

    def __post_init__(self) -> None:
        counts = ("max_train_steps", "num_train_epochs", "validation_steps", "validation_epochs")
        writes = ("logging_steps", "checkpointing_steps", "checkpoints_total_limit")
        at_least(1, **{name: getattr(self, name) for name in (*counts, *writes)})
        if self.max_train_steps is not None:  # else known with the data
            check_warmup(self.optimizer.lr_scheduler, self.optimizer.lr_warmup_steps, self.max_train_steps)
