"""Pipeline-level settings: those in ``model_index.json``, and those that diffusers corrects when it opens old
folders."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffuse_jax.messages import brief

logger = logging.getLogger(__name__)

FLAGS = (
    *("requires_safety_checker", "force_zeros_for_empty_prompt", "requires_aesthetics_score"),
    *("add_watermarker", "is_cosxl_edit"),
)
"""Settings that are true or false."""


def log_ignored(kind: Any, options: Mapping[str, Any], source: str | Path) -> None:
    """Log settings of ``model_index.json`` that have no effect although the user may expect one.

    Args:
      kind: the pipeline's class, whose ``settings`` are known.
      options: the settings of the folder.
      source: the folder, for messages.
    """
    unknown = {k: v for k, v in options.items() if k not in kind.settings and not k.startswith("_")}
    if unknown:
        logger.warning("%s: %s ignores unknown settings: %s", source, kind.__name__, brief(unknown))
    if options.get("add_watermarker"):
        logger.warning("%s: images are not watermarked, although add_watermarker is true", source)


def split_settings(
    kind: Any, options: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The settings of ``model_index.json`` with those among the caller's arguments that the class ``kind`` knows in
    their place, and the caller's other arguments.

    Raises:
      ValueError: a setting that is true or false has another value.
    """
    own = {name: value for name, value in given.items() if name in kind.settings}
    settings = {**options, **own} if own else options
    for name in FLAGS:
        if not isinstance(value := settings.get(name), bool | None):
            raise ValueError(
                f"{kind.__name__}: {name} (in model_index.json or as an argument) must be true or false, got "
                f"{brief(value)}"
            )
    return settings, {k: v for k, v in given.items() if k not in own}


def corrected(kind: Any, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The components, with the settings of old checkpoints corrected as in diffusers.

    Args:
      kind: the pipeline's class. Its ``sampler_settings`` override the scheduler's, if the scheduler has such fields.
        If there are any, a UNet saved before diffusers 0.9.0 with a ``sample_size`` below 64 gets 64.
      parts: the components; they are not modified.
    """
    parts = dict(parts)
    scheduler: Any
    unet: Any
    scheduler, unet = parts.get("scheduler"), parts.get("unet")
    config = {} if scheduler is None else scheduler.to_json()
    changes = {k: v for k, v in kind.sampler_settings.items() if k in config and k not in scheduler.ignored}
    if changes := {k: v for k, v in changes.items() if config[k] != v}:
        logger.info("%s: the scheduler of an old folder gets %s, as in diffusers", kind.__name__, changes)
        parts["scheduler"] = scheduler.replace(**changes)
    size = getattr(getattr(unet, "config", None), "sample_size", None)
    if kind.sampler_settings and isinstance(size, int) and size < 64 and _before_0_9(unet.config.extra):
        logger.info("%s: the UNet of an old folder gets sample_size=64, as in diffusers", kind.__name__)
        parts["unet"] = unet.clone(config=unet.config.replace(sample_size=64))
    return parts


def _before_0_9(extra: Any) -> bool:
    """Whether a config was saved by diffusers before 0.9.0."""
    found = re.match(r"0\.(\d+)", str(dict(extra).get("_diffusers_version", "")))
    return found is not None and int(found[1]) < 9
