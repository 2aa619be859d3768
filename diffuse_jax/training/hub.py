"""Resolving a model's name to a local folder."""

from __future__ import annotations

import functools
from pathlib import Path

from diffuse_jax import weights
from diffuse_jax.training.settings import HubSettings


@functools.lru_cache(maxsize=32)
def model_folder(
    source: str | Path, hub: HubSettings, skip: frozenset[str] = frozenset(), only_small: bool = False
) -> Path:
    """The local folder of a model, downloaded if necessary; constant within a run even if a branch on the Hub moves.

    With ``only_small``, no weights are downloaded.

    Raises:
      WeightsError: as for :func:`diffuse_jax.weights.resolve`.
    """
    return weights.resolve(source, **hub.options, skip=skip, only_small=only_small)
