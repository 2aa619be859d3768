"""Each network on its own, on both sides, with the inputs that a run of the pipeline gives it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from diffuse_jax.pipelines.parts.decode import autoencoder
from diffuse_jax.torch_backend.adapter import Recorded, TorchNetwork
from diffuse_jax.torch_backend.networks import to_numpy
from diffuse_jax.torch_backend.trace import Trace

Outputs = dict[str, np.ndarray]
"""What a network gave, by name; the name is empty where there is only one."""


class Call(NamedTuple):
    """One application of a network.

    Attributes:
      component: its name in the pipeline.
      label: what is special about this call, for example ``timestep 981``.
      made: method and arguments, the same for both sides.
    """

    component: str
    label: str
    made: Recorded

    def row(self, output: str) -> str:
        """The name of the row for one of the outputs."""
        method = "" if self.made.method == "__call__" else self.made.method
        return " ".join(word for word in (self.component, method, self.label, output) if word)


def calls_of(trace: Trace) -> Iterator[Call]:
    """What a run asked of each network: of each method the first, a middle and the last application."""
    for component, made in trace.calls.items():
        for method in dict.fromkeys(call.method for call in made):
            own = [call for call in made if call.method == method]
            for i in sorted({0, len(own) // 2, len(own) - 1}):
                yield Call(component, label(own[i]), own[i])
    yield from unused_encoders(trace)


def unused_encoders(trace: Trace) -> Iterator[Call]:
    """The images of the run for an autoencoder that only decoded: its other half is a part of the checkpoint too."""
    for component, made in trace.calls.items():
        methods = {call.method for call in made}
        if "decode" in methods and "encode" not in methods:
            yield Call(component, "", Recorded("encode", (2 * trace.images - 1,), {}))


def label(call: Recorded) -> str:
    """What tells an application from others of the same method: the timestep, if it has one."""
    second = call.args[1] if len(call.args) > 1 else None
    return f"timestep {float(second):g}" if second is not None and np.ndim(second) == 0 else ""


def named(outputs: Any) -> dict[str, Any]:
    """Outputs by name: the fields of a named tuple, those that are sequences as ``field i``."""
    if not hasattr(outputs, "_asdict"):
        return {"": outputs}
    found: dict[str, Any] = {}
    for name, value in outputs._asdict().items():
        word = name.replace("_", " ")
        if isinstance(value, tuple | list):
            found |= {f"{word} {i}": member for i, member in enumerate(value)}
        elif value is not None:
            found[word] = value
    return found


@functools.partial(jax.jit, static_argnames=("method", "model"))
def apply(params: Any, args: Any, kwargs: Any, *, method: str, model: Any) -> Any:
    """Our network's outputs, compiled once for each network and shape."""
    return model.apply({"params": params}, *args, method=method, **kwargs)


def run_ours(call: Call, model: Any, params: Any) -> Outputs:
    """Our outputs as float32, with matrix products in full precision."""
    made = call.made
    with jax.default_matmul_precision("highest"):
        outputs = apply(params, made.args, made.kwargs, method=made.method, model=autoencoder(model))
    return {name: np.asarray(value, np.float32) for name, value in named(outputs).items()}


def run_theirs(call: Call, network: TorchNetwork) -> Outputs:
    """PyTorch's outputs as float32."""
    outputs = network.run(call.made.method, call.made.args, call.made.kwargs)
    return {name: to_numpy(value) for name, value in named(outputs).items()}
