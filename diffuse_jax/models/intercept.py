"""Change or record what layers compute, without changing the networks.

Two layers have no parameters and exist for adapters: ``joins_N`` in a UNet's upward path concatenates the features
with a skip connection (FreeU scales both), and ``attend`` in every attention takes query, key and value
``[B,L,heads,D]`` (an IP-Adapter attends to an image with the same query).

A function that is already compiled does not change: enter the context inside it, where networks are applied. Pipelines
look at :func:`layer_changes` and compile one program for each set of changes that is active around a call.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax


class Call(NamedTuple):
    """One call of a layer or a block of layers: its path, its inputs, the function that computes it, and its module.

    The path is that of the layer's parameters; the whole network is a block too, with an empty path.
    """

    path: tuple[str, ...]
    inputs: tuple[Any, ...]
    named: Mapping[str, Any]
    function: Callable[..., Any]
    module: Any = None

    @property
    def name(self) -> str:
        """The last name in the path, or "" for the whole network."""
        return self.path[-1] if self.path else ""

    def output(self, *inputs: Any) -> Any:
        """The layer's output for its own inputs, or for these instead; keyword arguments stay the same."""
        return self.function(*(inputs or self.inputs), **self.named)


Change = Callable[[Call], Any]
"""``call -> the output to use``; ``call.output()`` is the layer's own output, which need not be computed at all."""


@contextlib.contextmanager
def changed_layers(change: Change) -> Iterator[None]:
    """Inside this context every layer returns ``change(call)``; so do layers that are recomputed (remat.py).

    Contexts nest: the innermost is closest to the layer, so an outer one sees what it returns. Arrays that ``change``
    closes over are differentiated like inputs.

    Example::

        def freeu(call):
            if call.path[:1] != ("up_blocks_0",) or not call.name.startswith("joins_"):
                return call.output()
            x, skip = call.inputs
            return call.output(1.2 * x, 0.9 * skip)

        with changed_layers(freeu):
            y = unet.apply({"params": params}, sample, timesteps, text)
    """

    with nn.intercept_methods(_Interceptor(change)):
        yield


@dataclasses.dataclass(frozen=True)
class _Interceptor:
    """A change in the form that Flax takes; two of the same change are equal."""

    change: Change

    def __call__(self, function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name != "__call__":
            return function(*args, **kwargs)
        return self.change(Call(context.module.path, args, kwargs, function, context.module))


def layer_changes() -> tuple[Any, ...]:
    """The changes that are active here, those of ``flax.linen.intercept_methods`` included, as comparable functions."""
    return tuple(nn.module._global_interceptor_stack)


class Layer(NamedTuple):
    """Input and output of one call of a layer; the first array if there are several."""

    path: tuple[str, ...]
    input: jax.Array
    output: jax.Array


@contextlib.contextmanager
def recorded_layers() -> Iterator[list[Layer]]:
    """Record every layer (and block of layers) called inside this context, in the order in which they finish.

    Under ``jit`` the arrays are tracers: return them from the compiled function to see their values.
    """
    layers: list[Layer] = []

    def record(call: Call) -> Any:
        y = call.output()
        layers.append(Layer(call.path, jax.tree.leaves((call.inputs, call.named))[0], jax.tree.leaves(y)[0]))
        return y

    with changed_layers(record):
        yield layers
