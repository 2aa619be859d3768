"""The arguments of a call are those of PyTorch diffusers' class of the same name."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest

import diffuse_jax
from diffuse_jax.pipelines.options import INSTEAD, argument_names

UNRELEASED = {"KarrasEDMPipeline"}
"""Classes that no release of diffusers has."""


def twins() -> dict[str, tuple[Any, Any]]:
    """Name of a pipeline -> our class and PyTorch's."""
    without = {"DiffusionPipeline", *UNRELEASED}
    names = [name for name in dir(diffuse_jax) if name.endswith("Pipeline") and name not in without]
    return {name: (getattr(diffuse_jax, name), getattr(diffusers, name, None)) for name in names}


@pytest.mark.parametrize("name", twins())
def test_every_argument_of_diffusers(name: str) -> None:
    ours, theirs = twins()[name]
    assert theirs is not None, f"diffusers has no {name}"
    parameters = inspect.signature(theirs.__call__).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - {"self"}
    assert not named - argument_names(ours) - set(INSTEAD)
