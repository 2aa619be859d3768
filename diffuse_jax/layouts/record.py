"""The configurations that a single file keeps in its metadata, because its tensors do not imply them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffuse_jax.errors import bad
from diffuse_jax.limits import parse_json
from diffuse_jax.weights.safetensors import read_metadata

KEY = "diffuse_jax"
"""The key in the metadata."""

Configs = Mapping[str, Mapping[str, Any]]
"""Component name -> configuration."""


def make_record(configs: Configs | None, schedulers: Configs | None) -> dict[str, str] | None:
    """The metadata that stores these configurations; None if there are none."""
    if not configs and not schedulers:
        return None
    return {KEY: json.dumps({"configs": configs or {}, "schedulers": schedulers or {}})}


def read_record(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """``{"configs": ..., "schedulers": ...}`` as :func:`make_record` stored them, or an empty dict.

    Raises:
      WeightsError: the record is damaged.
    """
    if path.suffix.lower() != ".safetensors" or KEY not in (metadata := read_metadata(path)):
        return {}
    found = parse_json(path, metadata[KEY], what=f"the configurations in its metadata ({KEY!r})")
    try:
        tables = [table for kind in ("configs", "schedulers") for table in found[kind].values()]
    except (TypeError, KeyError, AttributeError) as error:
        raise bad(path, f"the configurations in its metadata ({KEY!r}) are damaged ({error})") from error
    if not all(isinstance(table, dict) for table in tables):
        raise bad(path, f"the configurations in its metadata ({KEY!r}) are not objects")
    return found
