"""Changing or recording what layers return, from outside: networks need not know what is added to them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax

Change = Callable[[tuple[str, ...], jax.Array, jax.Array], jax.Array]
"""``(path of the layer, its input, its output) -> the output to use``."""


@contextlib.contextmanager
def changed_layers(change: Change) -> Iterator[None]:
    """Every layer of one input that is applied inside returns what ``change`` makes of its output."""

    def interceptor(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = call(*args, **kwargs)
        one_input = context.method_name == "__call__" and len(args) == 1 and not kwargs
        return change(context.module.path, args[0], y) if one_input else y

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

    def interceptor(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = call(*args, **kwargs)
        if context.method_name == "__call__":
            layers.append(Layer(context.module.path, jax.tree.leaves((args, kwargs))[0], jax.tree.leaves(y)[0]))
        return y

    with nn.intercept_methods(interceptor):
        yield layers
