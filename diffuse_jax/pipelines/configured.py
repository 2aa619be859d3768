"""Pipelines with the shapes of their parameters in their place: they check calls before any weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from diffuse_jax import layouts, weights
from diffuse_jax.models import Model
from diffuse_jax.pipelines import catalogue
from diffuse_jax.pipelines.pipeline import DiffusionPipeline
from diffuse_jax.pipelines.single_file import open_model
from diffuse_jax.weights.load import READERS


def configured_networks(
    source: str | Path, *, revision: str | None = None, **options: Any
) -> dict[str, Model | list[Model]]:
    """The networks of a pipeline by component, without their parameters; of a list of networks, its members.

    No weights are downloaded; of a single file, only the header is read.

    Args:
      source: a folder, Hub id or single file, as for :meth:`DiffusionPipeline.from_pretrained
        <diffuse_jax.pipelines.DiffusionPipeline.from_pretrained>`.
      revision: branch, tag or commit on the Hub.
      **options: how a single file is read: ``prediction_type``, ``ema``.

    Raises:
      WeightsError: there is no such model, or it is damaged.
    """
    if Path(source).suffix.lower() in READERS:
        parts = layouts.read_single_file(source, **options).networks
        return {name: open_model(source, part, jnp.float32) for name, part in parts.items()}
    folder = weights.resolve(source, revision=revision, only_small=True)
    found: dict[str, Model | list[Model]] = {}
    for name, entry in weights.read_index(folder).components.items():
        catalogue.check(name, entry)
        if name in catalogue.NOT_LOADED or (kind := catalogue.network(entry)) is None:
            continue
        members = [kind.from_config(member.folder) for member in catalogue.folders(name, entry)]
        found[name] = members if entry.class_name in catalogue.LISTS else members[0]
    return found


def with_shapes(network: Model | list[Model]) -> Any:
    """A network as a pair with its shapes, several as a list of such pairs, as :meth:`from_pretrained` takes them."""
    pair = lambda model: (model, model.shapes())
    return [pair(model) for model in network] if isinstance(network, list) else pair(network)


def configured_pipeline(
    source: str | Path,
    *,
    revision: str | None = None,
    tokenizer: Any = None,
    prediction_type: str | None = None,
    ema: bool = False,
    **components: Any,
) -> DiffusionPipeline:
    """The pipeline of a folder, Hub id or single file with the shapes of its parameters in their place.

    It makes requests, which checks the arguments of a call, but cannot run them. Arguments and errors are those of
    :meth:`DiffusionPipeline.from_pretrained <diffuse_jax.pipelines.DiffusionPipeline.from_pretrained>` and
    ``from_single_file``, except those about weights.
    """
    single = Path(source).suffix.lower() in READERS
    options: dict[str, Any] = {"prediction_type": prediction_type, "ema": ema} if single else {}
    networks = configured_networks(source, revision=revision, **options)
    given = {name: with_shapes(network) for name, network in networks.items()} | components
    if single:
        return DiffusionPipeline.from_single_file(source, tokenizer=tokenizer, **options, **given)
    folder = weights.resolve(source, revision=revision, only_small=True)
    return DiffusionPipeline.from_pretrained(folder, **given)
