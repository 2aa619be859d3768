"""The one network of a trainer: from a checkpoint, or new from a config."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
from jax.sharding import Mesh

from diffuse_jax import weights
from diffuse_jax.config import Config
from diffuse_jax.models import Model, Params
from diffuse_jax.sharding import param_shardings
from diffuse_jax.training.arguments import PRECISIONS
from diffuse_jax.training.flags import Parser
from diffuse_jax.training.initial import initial_params

Network = TypeVar("Network", bound=Model)

PARTS = {"unet", "vae", "text_encoder", "text_encoder_2", "safety_checker", "image_encoder"}
"""Folders of networks in a pipeline; those that are not trained need not be downloaded."""


def add_network(parser: Parser, subfolder: str, default: str) -> None:
    """The flags that say which network is trained."""
    add = parser.group("model")
    add(
        "--pretrained_model_name_or_path",
        help=f"start from these weights: a folder or a Hub id, of the network or of a pipeline with {subfolder}/",
    )
    add(
        "--model_config_name_or_path",
        help=f"train a new network with the config.json of this folder or Hub id; without either flag, {default}",
    )


def open_network(
    kind: type[Network], args: argparse.Namespace, mesh: Mesh, subfolder: str, default: Config
) -> tuple[Network, Params]:
    """The network in the wanted computing precision, and its parameters, float32 whatever that is.

    Args:
      kind: its class.
      args: with the flags of :func:`add_network` and :func:`~diffuse_jax.training.arguments.make_parser`.
      mesh: each device reads its part of a checkpoint only. New parameters stay on the host until the training state
        is built.
      subfolder: where it lies in a pipeline.
      default: the config of a new network where no flag names one.

    Raises:
      WeightsError: no such folder, another network's config, or weights that do not fit it.
      ValueError: both a checkpoint and a config are named.
    """
    source, config = args.pretrained_model_name_or_path, args.model_config_name_or_path
    if source is not None and config is not None:
        raise ValueError(
            f"--pretrained_model_name_or_path {source} has a config; leave out --model_config_name_or_path {config}"
        )
    dtype = jnp.dtype(PRECISIONS[args.mixed_precision])
    if source is not None:
        folder = network_folder(args, source, subfolder)
        shardings = param_shardings(kind.from_config(folder).shapes(), mesh)
        return kind.from_pretrained(
            folder, dtype=dtype, param_dtype=jnp.float32, variant=args.variant, shardings=shardings
        )
    if config is not None:
        model = kind.from_config(network_folder(args, config, subfolder), dtype=dtype)
    else:
        model = kind(config=default, dtype=dtype)
    return model, initial_params(model.shapes(), args.seed)


def network_folder(args: argparse.Namespace, source: str, subfolder: str) -> Path:
    """Where the network lies: in ``subfolder``, or alone."""
    hub = {name: getattr(args, name) for name in ("revision", "variant", "cache_dir")}
    found = weights.resolve(source, **hub, skip=PARTS - {subfolder})
    return found / subfolder if (found / subfolder).is_dir() else found
