"""A PyTorch module in the place of a network: our compiled methods call it, and never know."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffuse_jax.models import Model
from diffuse_jax.torch_backend.networks import exact, to_numpy, to_torch
from diffuse_jax.torch_backend.twins import CALLS


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """One application of a network: its method and what it was given, as NumPy arrays."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class TorchNetwork:
    """PyTorch's module behind the interface of one of our networks; every instance is a network of its own.

    Attributes:
      model: our network, for its configuration and the shapes of its outputs; its parameters are not used.
      module: PyTorch's.
      calls: where every application is recorded, if anybody asks for it.
    """

    model: Model
    module: Any
    calls: list[Recorded] | None = None

    @property
    def config(self) -> Any:
        """Our configuration."""
        return self.model.config

    @property
    def dtype(self) -> Any:
        """What it computes in."""
        return self.model.dtype

    def shapes(self) -> dict[str, Any]:
        """It has no parameters that JAX could read."""
        return {}

    def recording(self) -> TorchNetwork:
        """The same module, with a record of its applications."""
        return dataclasses.replace(self, calls=[])

    def apply(self, variables: Mapping[str, Any], *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """As ``model.apply``, computed by PyTorch when the program runs.

        Raises:
          ValueError: it is not known how PyTorch's module is called.
        """
        if (type(self.model).__name__, method) not in CALLS:
            raise ValueError(
                f"{type(self.model).__name__}.{method} has no twin on PyTorch yet (torch_backend/twins.py)"
            )
        apply = lambda params, a, k: self.model.apply({"params": params}, *a, method=method, **k)
        shapes = jax.eval_shape(apply, self.model.shapes(), args, kwargs)
        return jax.pure_callback(functools.partial(self._run, method, shapes), shapes, args, kwargs)

    def _run(self, method: str, shapes: Any, args: Any, kwargs: Any) -> Any:
        """What the callback does, on the host."""
        args, kwargs = jax.tree.map(np.asarray, (args, kwargs))
        if self.calls is not None:
            self.calls.append(Recorded(method, args, kwargs))
        outputs = self.run(method, args, kwargs)
        return jax.tree.map(lambda x, shape: to_numpy(x).astype(shape.dtype), outputs, shapes)

    def run(self, method: str, args: Any, kwargs: Any) -> Any:
        """The module's outputs as tensors, for arguments that are NumPy arrays."""
        device = next(self.module.parameters()).device
        tensors = jax.tree.map(lambda x: to_torch(x, device), (args, kwargs))
        with exact():
            return CALLS[type(self.model).__name__, method](self.module, *tensors[0], **tensors[1])
