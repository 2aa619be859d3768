"""The network of a trainer with a single network: from a checkpoint, or new from a config."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
from jax.sharding import Mesh

from diffuse_jax.config import Config
from diffuse_jax.models import Model, Params
from diffuse_jax.sharding import param_shardings
from diffuse_jax.training.distributed import say
from diffuse_jax.training.hub import model_folder
from diffuse_jax.training.initial import initial_params
from diffuse_jax.training.settings import HubSettings, NetworkSettings

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=Model)

PARTS = {"unet", "vae", "text_encoder", "text_encoder_2", "safety_checker", "image_encoder"}
"""Subfolders of networks in a pipeline; those of networks that are not trained need not be downloaded."""


def open_network(
    kind: type[Network], settings: NetworkSettings, mesh: Mesh, subfolder: str, default: Config, seed: int = 0
) -> tuple[Network, Params]:
    """The network with the requested compute dtype, and its parameters, which are always float32.

    Args:
      kind: the class of the network.
      settings: where the network comes from.
      mesh: the mesh of the run; each device loads only its shard of a checkpoint. The parameters of a new network stay
        on the host until the training state is built.
      subfolder: the subfolder of the network in a pipeline.
      default: the config of a new network if the settings name none.
      seed: seed of a new network's parameters.

    Raises:
      WeightsError: the folder does not exist, its config is of another network, or the weights do not fit it.
    """
    model, hub = configured_network(kind, settings, subfolder, default), settings.hub
    warn_of_dropout(model)
    if settings.pretrained_model_name_or_path is None:
        say(f"initialising a new {kind.__name__} from seed {seed}")
        return model, initial_params(model, seed)
    folder = network_folder(hub, settings.pretrained_model_name_or_path, subfolder)
    say(f"loading {kind.__name__} from {folder}")
    shardings = param_shardings(model.shapes(), mesh)
    return kind.from_pretrained(
        folder, dtype=model.dtype, param_dtype=jnp.float32, variant=hub.variant, shardings=shardings
    )


def configured_network(kind: type[Network], settings: NetworkSettings, subfolder: str, default: Config) -> Network:
    """The network of :func:`open_network` without its parameters: only its configuration is read.

    Raises:
      WeightsError: the folder does not exist, or its config is of another network.
    """
    named = settings.pretrained_model_name_or_path or settings.model_config_name_or_path
    if named is None:
        return kind(config=default, dtype=settings.compute.dtype)
    folder = network_folder(settings.hub, named, subfolder, only_small=True)
    return kind.from_config(folder, dtype=settings.compute.dtype)


def warn_of_dropout(model: Model) -> None:
    """Log a warning if the config of a network has dropout, because training does not use it."""
    for name in ("dropout", "attention_dropout"):
        rate = getattr(model.config, name, dict(model.config.extra).get(name))
        if rate:
            logger.warning("%s has %s=%s; it is trained without dropout", type(model).__name__, name, rate)


def network_folder(hub: HubSettings, source: str | Path, subfolder: str, *, only_small: bool = False) -> Path:
    """The folder of the network: ``subfolder`` of the model if it exists, otherwise the model's folder itself."""
    found = model_folder(source, hub, frozenset(PARTS - {subfolder}), only_small)
    return found / subfolder if (found / subfolder).is_dir() else found
