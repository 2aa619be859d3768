"""Settings of the model that is trained: where it comes from, its precision and its memory."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from diffuse_jax.adapters.targets import TARGETS
from diffuse_jax.bounds import COUNT
from diffuse_jax.training.checks import Checked, one_of

if TYPE_CHECKING:  # `--help` reads this module, and needs no JAX for it
    import numpy as np

PRECISIONS = {"no": "float32", "bf16": "bfloat16"}
"""Values of ``mixed_precision`` -> dtype in which the networks compute."""

REMAT_POLICIES = ("none", "blocks", "full")
"""Values of ``remat_policy``: :data:`diffuse_jax.models.remat.POLICIES`, without importing the models."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubSettings(Checked):
    """Which version of a model is downloaded from the Hub, and where downloads are kept.

    Attributes:
      revision: branch, tag or commit; the main branch if None.
      variant: which weight files to read, such as "fp16"; those without a variant if None. Applies to local folders
      too.
      cache_dir: where downloads are kept; the Hub's default folder if None.
      hub_token: access token; the one stored by `hf auth login` if None.
    """

    revision: str | None = None
    variant: str | None = None
    cache_dir: str | Path | None = None
    hub_token: str | None = dataclasses.field(default=None, repr=False)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for :func:`diffuse_jax.weights.resolve` and for the functions that open models with it."""
        return {
            "revision": self.revision,
            "variant": self.variant,
            "cache_dir": self.cache_dir,
            "token": self.hub_token,
        }


def check_precision(name: str) -> None:
    """Check a value of ``mixed_precision``.

    Raises:
      ValueError: the value is unknown; the message lists the choices.
    """
    if name == "fp16":
        raise ValueError("'fp16' (gradients vanish without loss scaling; bf16 has the range of float32)")
    if name not in PRECISIONS:
        raise ValueError(f"{name!r} (choose from {', '.join(PRECISIONS)})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeSettings(Checked):
    """Precision and memory of the networks in a training step.

    Attributes:
      mixed_precision: "no" computes in float32, "bf16" in bfloat16. Trained parameters are float32 either way.
      gradient_checkpointing: equivalent to the policy "blocks".
      remat_policy: what the backward pass recomputes to save memory, one of
        :data:`REMAT_POLICIES`; overrides ``gradient_checkpointing``.

    Raises:
      ValueError: the precision or the policy is unknown.
    """

    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    remat_policy: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            check_precision(self.mixed_precision)
        except ValueError as error:
            raise ValueError(f"mixed_precision: invalid choice: {error}") from None
        one_of(REMAT_POLICIES, remat_policy=self.remat_policy)

    @property
    def dtype(self) -> np.dtype:
        """The dtype in which networks compute."""
        import jax.numpy as jnp

        return jnp.dtype(PRECISIONS[self.mixed_precision])

    @property
    def remat(self) -> str:
        """The value of a network's ``remat``."""
        return self.remat_policy or ("blocks" if self.gradient_checkpointing else "none")


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
"""What a denoising network can predict."""


CLASS_LABELS = ("noise_level", "timesteps")
"""What a super-resolution model of DeepFloyd IF sees beside the noisy image, and what its class labels say of it: the
small image, enlarged and noised to a random level, which is the default; or, as in diffusers' scripts, the noisy image
again, whose level is that of the timestep."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings(Checked):
    """The text-to-image model to start from, and which of its networks are trained.

    Attributes:
      pretrained_model_name_or_path: a folder or a Hub id.
      pretrained_vae_model_name_or_path: a folder or Hub id of an autoencoder to use instead; None keeps the pipeline's.
      pretrained_prior_model_name_or_path: a folder or Hub id of the prior whose image encoder a decoder of Kandinsky
        2.2 reads.
      effnet_path: a file with the EfficientNet that makes the maps which a prior of Würstchen learns.
      class_labels_conditioning: one of :data:`CLASS_LABELS`, for super-resolution with DeepFloyd IF.
      prediction_type: one of :data:`PREDICTION_TYPES`, which overrides the scheduler's.
      train_text_encoder: train the text encoders together with the UNet.
      compute: precision and memory of the networks.
      hub: which version of the model is downloaded from the Hub.

    Raises:
      ValueError: the prediction type or what the class labels are is unknown.
    """

    pretrained_model_name_or_path: str | Path
    pretrained_vae_model_name_or_path: str | Path | None = None
    pretrained_prior_model_name_or_path: str | Path | None = None
    effnet_path: str | Path | None = None
    class_labels_conditioning: str | None = None
    prediction_type: str | None = None
    train_text_encoder: bool = False
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    hub: HubSettings = field(default_factory=HubSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(PREDICTION_TYPES, prediction_type=self.prediction_type)
        one_of(CLASS_LABELS, class_labels_conditioning=self.class_labels_conditioning)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkSettings(Checked):
    """The network that is trained: from a checkpoint, new from a config, or, with neither, the trainer's default.

    Attributes:
      pretrained_model_name_or_path: start from these weights: folder or Hub id of the network, or of a pipeline.
      model_config_name_or_path: train a new network with the ``config.json`` of this folder or Hub id.
      compute: precision and memory of the network.
      hub: which version is downloaded from the Hub.

    Raises:
      ValueError: both a checkpoint and a config are given.
    """

    pretrained_model_name_or_path: str | Path | None = None
    model_config_name_or_path: str | Path | None = None
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    hub: HubSettings = field(default_factory=HubSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        source, config = self.pretrained_model_name_or_path, self.model_config_name_or_path
        if source is not None and config is not None:
            raise ValueError(
                f"--pretrained_model_name_or_path {source} has a config; leave out --model_config_name_or_path {config}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings(Checked):
    """The layers that LoRA adapts, and the rank.

    Attributes:
      rank: rank of the LoRA matrices.
      lora_targets: regular expression for the paths of the layers to adapt.

    Raises:
      ValueError: the rank is not positive, or the targets are no regular expression.
    """

    rank: Annotated[int, COUNT] = 4
    lora_targets: str = TARGETS

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.lora_targets)
        except re.error as error:
            raise ValueError(f"lora_targets must be a regular expression, got {self.lora_targets!r}: {error}") from None
