"""Pipelines of two stages: the first one's components have a prefix in their names, as ``prior_scheduler``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from diffuse_jax.pipelines.pipeline import DiffusionPipeline

Stage = TypeVar("Stage", bound=DiffusionPipeline)


def stage(pipe: DiffusionPipeline, kind: type[Stage], prefix: str) -> Stage:
    """The stage of a pipeline whose components have a prefix, as a pipeline by itself; parameters are shared."""
    cut = lambda table: {k.removeprefix(prefix): value for k, value in table.items() if k.startswith(prefix)}
    return kind(cut(pipe.components), cut(pipe.params), pipe.options, pipe.mesh, programs=pipe.programs)


def joined(first: DiffusionPipeline, second: DiffusionPipeline, prefix: str) -> Mapping[str, Any]:
    """The arguments that make one pipeline of two, of whose components the first one's get a prefix."""
    of_both = lambda a, b: {**{f"{prefix}{name}": value for name, value in a.items()}, **b}
    return {
        "components": of_both(first.components, second.components),
        "params": of_both(first.params, second.params),
        "options": {**first.options, **second.options},
        "mesh": second.mesh,
        "programs": second.programs,
    }
