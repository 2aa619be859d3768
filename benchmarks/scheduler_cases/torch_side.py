"""Schedulers of PyTorch diffusers with controlled noise and precision."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


class _Double(types.ModuleType):
    """A module whose ``float32`` is ``float64``."""

    def __init__(self, module: types.ModuleType) -> None:
        super().__init__(module.__name__)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@contextlib.contextmanager
def patched(module: types.ModuleType, draw: Callable[..., Any], *, double: bool) -> Iterator[None]:
    """Let a diffusers scheduler module take its noise from ``draw`` and, with ``double``, compute in float64."""
    import torch

    names: dict[str, Any] = {"randn_tensor": draw, "BrownianTreeNoiseSampler": lambda *_, **__: draw}
    if double:
        names |= {"torch": _Double(torch), "np": _Double(np)}
    names = {k: v for k, v in names.items() if hasattr(module, k)}
    before, dtype = {k: getattr(module, k) for k in names}, torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    for k, v in names.items():
        setattr(module, k, v)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        for k, v in before.items():
            setattr(module, k, v)


def built(cls: Any, config: dict[str, Any]) -> Any:
    """The scheduler, before its ``set_timesteps``.

    Some constructors set all training timesteps, which takes half a second each time and is always replaced.
    """
    original = cls.set_timesteps
    cls.set_timesteps = lambda self, n, *args, **kwargs: original(self, 2, *args, **kwargs)
    try:
        return cls(**config)
    finally:
        cls.set_timesteps = original


def torch_class(name: str) -> Any:
    """The scheduler class of diffusers with this name."""
    import diffusers

    cls = getattr(diffusers.schedulers, name)
    if "dummy" not in cls.__module__:
        return cls
    # It needs torchsde only for noise, which it is given here.
    sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    return getattr(importlib.import_module(f"diffusers.schedulers.{_NEED_TORCHSDE[name]}"), name)


_NEED_TORCHSDE = {
    "CosineDPMSolverMultistepScheduler": "scheduling_cosine_dpmsolver_multistep",
    "DPMSolverSDEScheduler": "scheduling_dpmsolver_sde",
}
