"""The one network of a trainer: from a checkpoint, or new from a config."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import field
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
from jax.sharding import Mesh

from diffuse_jax.config import Config
from diffuse_jax.models import Model, Params
from diffuse_jax.sharding import param_shardings
from diffuse_jax.training.compute import ComputeSettings
from diffuse_jax.training.flags import Parser
from diffuse_jax.training.hub import HubSettings, model_folder
from diffuse_jax.training.initial import initial_params

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=Model)

PARTS = {"unet", "vae", "text_encoder", "text_encoder_2", "safety_checker", "image_encoder"}
"""Folders of networks in a pipeline; those that are not trained need not be downloaded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkSettings:
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
        source, config = self.pretrained_model_name_or_path, self.model_config_name_or_path
        if source is not None and config is not None:
            raise ValueError(
                f"--pretrained_model_name_or_path {source} has a config; leave out --model_config_name_or_path {config}"
            )


def add_network(parser: Parser, subfolder: str, default: str) -> None:
    """The flags that say which network is trained."""
    add = parser.group("model", NetworkSettings)
    add(
        "--pretrained_model_name_or_path",
        help=f"start from these weights: a folder or a Hub id, of the network or of a pipeline with {subfolder}/",
    )
    add(
        "--model_config_name_or_path",
        help=f"train a new network with the config.json of this folder or Hub id; without either flag, {default}",
    )


def open_network(
    kind: type[Network], settings: NetworkSettings, mesh: Mesh, subfolder: str, default: Config, seed: int = 0
) -> tuple[Network, Params]:
    """The network in the wanted computing precision, and its parameters, float32 whatever that is.

    Args:
      kind: its class.
      settings: where it comes from.
      mesh: each device reads its part of a checkpoint only. New parameters stay on the host until the training state
        is built.
      subfolder: where it lies in a pipeline.
      default: the config of a new network where the settings name none.
      seed: of a new network's parameters.

    Raises:
      WeightsError: no such folder, another network's config, or weights that do not fit it.
    """
    source, config = settings.pretrained_model_name_or_path, settings.model_config_name_or_path
    dtype, hub = settings.compute.dtype, settings.hub
    if source is not None:
        folder = network_folder(hub, source, subfolder)
        model = kind.from_config(folder)
        warn_of_dropout(model)
        shardings = param_shardings(model.shapes(), mesh)
        return kind.from_pretrained(
            folder, dtype=dtype, param_dtype=jnp.float32, variant=hub.variant, shardings=shardings
        )
    if config is not None:
        model = kind.from_config(network_folder(hub, config, subfolder), dtype=dtype)
    else:
        model = kind(config=default, dtype=dtype)
    warn_of_dropout(model)
    return model, initial_params(model.shapes(), seed)


def warn_of_dropout(model: Model) -> None:
    """Say on the log that a network which asks for dropout is trained without it."""
    for name in ("dropout", "attention_dropout"):
        rate = getattr(model.config, name, dict(model.config.extra).get(name))
        if rate:
            logger.warning("%s says %s=%s; it is trained without dropout", type(model).__name__, name, rate)


def network_folder(hub: HubSettings, source: str | Path, subfolder: str) -> Path:
    """Where the network lies: in ``subfolder``, or alone."""
    found = model_folder(source, hub, frozenset(PARTS - {subfolder}))
    return found / subfolder if (found / subfolder).is_dir() else found
