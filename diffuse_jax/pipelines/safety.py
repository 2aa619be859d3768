"""The safety checker of a pipeline: when it runs, and what is said about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffuse_jax.messages import warn
from diffuse_jax.pipelines.method import Net
from diffuse_jax.pipelines.parts.decode import Raw
from diffuse_jax.pipelines.parts.safety import Checked
from diffuse_jax.pipelines.running import Request
from diffuse_jax.processors import CLIPImageProcessor

CHECKER, PROCESSOR = "safety_checker", "feature_extractor"
REQUIRED = "requires_safety_checker"
"""The setting of ``model_index.json`` that says whether to warn of a missing safety checker."""

SETTING = {REQUIRED: "honoured: false means no warning without a checker"}
"""It as an entry of a pipeline's ``settings``."""


def check_processor(kind: type, components: Mapping[str, Any]) -> None:
    """Refuse a safety checker without the processor that prepares images for it.

    Raises:
      ValueError: there is none, or it prepares images for another network.
    """
    if components.get(CHECKER) is None:
        return
    processor = components.get(PROCESSOR)
    if processor is not None and not isinstance(processor, CLIPImageProcessor):
        raise ValueError(
            f"{kind.__name__} has a safety_checker, for which a CLIPImageProcessor prepares the images, but its "
            f"feature_extractor is a {type(processor).__name__}; leave the checker out with safety_checker=None"
        )
    if processor is None:
        raise ValueError(
            f"{kind.__name__} has a safety_checker but no feature_extractor, which prepares the images for it; give "
            "one (a CLIPImageProcessor), or leave the checker out with safety_checker=None"
        )


def with_check(pipe: Any, request: Request) -> Request:
    """A request whose images are checked, if the pipeline has a safety checker; what is not decoded is no image."""
    checker = pipe.components.get(CHECKER)
    if checker is None or request.output_type == "latent" or isinstance(request.method.decode, Raw):
        return request
    decode = Checked(request.method.decode, Net(CHECKER, checker), pipe.components[PROCESSOR])
    return request._replace(method=replace(request.method, decode=decode))


def warn_if_off(components: Mapping[str, Any], required: bool) -> None:
    """Warn that images are not checked, unless the user or the checkpoint says that they need not be."""
    if required and components.get(CHECKER) is None:
        warn(
            "there is no safety_checker, so images are not checked; the licence of the model may ask for it where "
            f"others see them. {REQUIRED}=False says that this is meant"
        )
