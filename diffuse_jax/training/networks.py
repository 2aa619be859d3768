"""The one network of a trainer: from a checkpoint, or new from a config."""

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
"""Folders of networks in a pipeline; those that are not trained need not be downloaded."""


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
        say(f"loading {kind.__name__} from {folder}")
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
    say(f"a new {kind.__name__}, from seed {seed}")
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
