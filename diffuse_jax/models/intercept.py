"""Changing or recording what layers compute, from outside: networks need not know what is added to them.

Two layers have no parameters and are there for adapters: ``joins_N`` in a UNet's upward path puts a tensor of the
downward path beside the features (FreeU scales both), and ``attend`` in every attention takes query, key and value
``[B,L,heads,D]`` (an IP-Adapter attends to an image with the same query).

A function that is compiled already is not changed: enter the context inside it, where networks are applied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax


class Call(NamedTuple):
    """One application of a layer or a block of layers: where it is, what it was given, and how to compute it.

    The path is that of the layer's parameters; the network as a whole is a block too, with an empty path.
    """

    path: tuple[str, ...]
    inputs: tuple[Any, ...]
    named: Mapping[str, Any]
    function: Callable[..., Any]

    @property
    def name(self) -> str:
        """The last word of the path, or "" for the whole network."""
        return self.path[-1] if self.path else ""

    def output(self, *inputs: Any) -> Any:
        """What the layer returns for its own inputs, or for these instead; named inputs stay."""
        return self.function(*(inputs or self.inputs), **self.named)


Change = Callable[[Call], Any]
"""``call -> the output to use``; ``call.output()`` is the layer's own, and it need not be computed at all."""


@contextlib.contextmanager
def changed_layers(change: Change) -> Iterator[None]:
    """Every layer that is applied inside returns what ``change`` makes of its call; recomputed layers too (remat.py).

    Contexts nest: the innermost is nearest to the layer, so an outer one sees what it returns. Arrays that ``change``
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

    def interceptor(function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name != "__call__":
            return function(*args, **kwargs)
        return change(Call(context.module.path, args, kwargs, function))

    with nn.intercept_methods(interceptor):
        yield


class Layer(NamedTuple):
    """What one application of a layer took and gave; of several arrays, the first."""

    path: tuple[str, ...]
    input: jax.Array
    output: jax.Array


@contextlib.contextmanager
def recorded_layers() -> Iterator[list[Layer]]:
    """Every layer (and block of layers) that is applied inside, in the order in which they finish.

    While compiling the arrays are traced: return them from the compiled function to see their values.
    """
    layers: list[Layer] = []

    def record(call: Call) -> Any:
        y = call.output()
        layers.append(Layer(call.path, jax.tree.leaves((call.inputs, call.named))[0], jax.tree.leaves(y)[0]))
        return y

    with changed_layers(record):
        yield layers
