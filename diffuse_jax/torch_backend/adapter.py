"""A PyTorch module with the interface of our networks, which our compiled methods can call."""

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


def split_flags(kwargs: Mapping[str, Any]) -> tuple[dict[str, bool], dict[str, Any]]:
    """Keyword arguments that decide what is computed, and those that are arrays."""
    is_flag = {name: isinstance(value, bool) for name, value in kwargs.items()}
    return {n: v for n, v in kwargs.items() if is_flag[n]}, {n: v for n, v in kwargs.items() if not is_flag[n]}


@dataclasses.dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call of a network: its method and its arguments as NumPy arrays (flags as bools)."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class TorchNetwork:
    """A PyTorch module with the interface of one of our networks. Instances are compared by identity.

    Attributes:
      model: our network, used for its configuration and output shapes; its parameters are not used.
      module: the PyTorch module.
      calls: the list to record calls in; None records nothing.
    """

    model: Model
    module: Any
    calls: list[RecordedCall] | None = None

    @property
    def config(self) -> Any:
        """The configuration of our network."""
        return self.model.config

    @property
    def dtype(self) -> Any:
        """The dtype that it computes in."""
        return self.model.dtype

    def shapes(self) -> dict[str, Any]:
        """Empty, because its parameters are not JAX arrays."""
        return {}

    def recording(self) -> TorchNetwork:
        """The same module, recording its calls."""
        return dataclasses.replace(self, calls=[])

    def apply(self, variables: Mapping[str, Any], *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Like ``model.apply``, but computed by PyTorch when the program runs.

        Raises:
          ValueError: :mod:`~diffuse_jax.torch_backend.twins` has no entry for the class and method.
        """
        if (type(self.model).__name__, method) not in CALLS:
            raise ValueError(
                f"{type(self.model).__name__}.{method} has no PyTorch counterpart yet (torch_backend/twins.py)"
            )
        flags, arrays = split_flags(kwargs)
        apply = lambda params, a, k: self.model.apply({"params": params}, *a, method=method, **k, **flags)
        shapes = jax.eval_shape(apply, self.model.shapes(), args, arrays)
        return jax.pure_callback(functools.partial(self._run, method, flags, shapes), shapes, args, arrays)

    def _run(self, method: str, flags: dict[str, bool], shapes: Any, args: Any, kwargs: Any) -> Any:
        """The host callback."""
        args, kwargs = jax.tree.map(np.asarray, (args, kwargs))
        kwargs |= flags
        if self.calls is not None:
            self.calls.append(RecordedCall(method, args, kwargs))
        outputs = self.run(method, args, kwargs)
        return jax.tree.map(lambda x, shape: to_numpy(x).astype(shape.dtype), outputs, shapes)

    def run(self, method: str, args: Any, kwargs: Any) -> Any:
        """Call the module with NumPy arguments; returns its outputs as tensors."""
        device = next(self.module.parameters()).device
        flags, arrays = split_flags(kwargs)
        tensors = jax.tree.map(lambda x: to_torch(x, device), (args, arrays))
        with exact():
            return CALLS[type(self.model).__name__, method](self.module, *tensors[0], **tensors[1], **flags)
