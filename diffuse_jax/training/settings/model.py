"""The settings of the model that is trained: where it comes from, and what it computes in."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from diffuse_jax.adapters.targets import TARGETS
from diffuse_jax.bounds import COUNT
from diffuse_jax.training.checks import Checked, one_of

if TYPE_CHECKING:  # `--help` reads this module, and needs no JAX for it
    import numpy as np

PRECISIONS = {"no": "float32", "bf16": "bfloat16"}
"""What ``mixed_precision`` may be -> what networks then compute in."""

REMAT_POLICIES = ("none", "blocks", "full")
"""What ``remat_policy`` may be: :data:`diffuse_jax.models.remat.POLICIES`, without loading the models."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubSettings(Checked):
    """Which version of a model is taken from the Hub, and where downloads are kept.

    Attributes:
      revision: branch, tag or commit; the main branch if None.
      variant: which weight files to read, such as "fp16"; those without a variant if None. Also of local folders.
      cache_dir: where downloads are kept; the Hub's own folder if None.
      hub_token: access token; the one that `hf auth login` stored if None.
    """

    revision: str | None = None
    variant: str | None = None
    cache_dir: str | Path | None = None
    hub_token: str | None = dataclasses.field(default=None, repr=False)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of :func:`diffuse_jax.weights.resolve` and all that open models by it."""
        return {
            "revision": self.revision,
            "variant": self.variant,
            "cache_dir": self.cache_dir,
            "token": self.hub_token,
        }


def check_precision(name: str) -> None:
    """Refuse what is not a precision.

    Raises:
      ValueError: naming those that there are.
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
      gradient_checkpointing: the same as the policy "blocks".
      remat_policy: what the backward pass computes again to save memory, one of
        :data:`REMAT_POLICIES`; wins over ``gradient_checkpointing``.

    Raises:
      ValueError: the precision or the policy is not known.
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
        """What networks compute in."""
        import jax.numpy as jnp

        return jnp.dtype(PRECISIONS[self.mixed_precision])

    @property
    def remat(self) -> str:
        """What a network's ``remat`` should be."""
        return self.remat_policy or ("blocks" if self.gradient_checkpointing else "none")


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
"""What a denoising network may predict."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings(Checked):
    """A Stable Diffusion (1.x, 2.x or XL) to start from, and which of its networks are trained.

    Attributes:
      pretrained_model_name_or_path: a folder or a Hub id.
      pretrained_vae_model_name_or_path: a folder or Hub id whose ``vae/`` replaces the pipeline's; None keeps that.
      prediction_type: one of :data:`PREDICTION_TYPES`, instead of the scheduler's.
      train_text_encoder: train the text encoders together with the UNet.
      compute: precision and memory of the networks.
      hub: which version of the model is taken from the Hub.

    Raises:
      ValueError: the prediction type is not known.
    """

    pretrained_model_name_or_path: str | Path
    pretrained_vae_model_name_or_path: str | Path | None = None
    prediction_type: str | None = None
    train_text_encoder: bool = False
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    hub: HubSettings = field(default_factory=HubSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(PREDICTION_TYPES, prediction_type=self.prediction_type)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkSettings(Checked):
    """The network that is trained: from a checkpoint, new from a config, or, with neither, a trainer's own choice.

    Attributes:
      pretrained_model_name_or_path: start from these weights: a folder or a Hub id, of the network or of a pipeline.
      model_config_name_or_path: train a new network with the ``config.json`` of this folder or Hub id.
      compute: precision and memory of the network.
      hub: which version is taken from the Hub.

    Raises:
      ValueError: both a checkpoint and a config are named.
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
    """Which layers get a low-rank pair, and of what rank.

    Attributes:
      rank: inner dimension of the pairs.
      lora_targets: regular expression: paths of the dense layers that get a pair.

    Raises:
      ValueError: the rank is not positive.
    """

    rank: Annotated[int, COUNT] = 4
    lora_targets: str = TARGETS
