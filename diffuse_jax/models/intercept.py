"""Changing what layers return, from outside: networks need not know what is added to them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

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
