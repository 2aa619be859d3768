"""Comparing each network separately on both sides, with the inputs that it gets in a run of the pipeline."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from diffuse_jax.pipelines.parts.decode import autoencoder
from diffuse_jax.torch_backend.adapter import RecordedCall, TorchNetwork, split_flags
from diffuse_jax.torch_backend.networks import to_numpy
from diffuse_jax.torch_backend.trace import Trace

Outputs = dict[str, np.ndarray]
"""A network's outputs by name; the name is empty if there is only one output."""


class Call(NamedTuple):
    """One call of a network.

    Attributes:
      component: the network's name in the pipeline.
      label: what distinguishes this call, for example ``timestep 981``.
      recorded: method and arguments, the same for both sides.
    """

    component: str
    label: str
    recorded: RecordedCall

    def row(self, output: str) -> str:
        """The name of the table row for one of the outputs."""
        method = "" if self.recorded.method == "__call__" else self.recorded.method
        return " ".join(word for word in (self.component, method, self.label, output) if word)


def calls_of(trace: Trace) -> Iterator[Call]:
    """The first, a middle and the last call of each network and method in a run."""
    for component, recorded in trace.calls.items():
        for method in dict.fromkeys(call.method for call in recorded):
            calls = [call for call in recorded if call.method == method]
            for i in sorted({0, len(calls) // 2, len(calls) - 1}):
                yield Call(component, label(calls[i]), calls[i])
    yield from unused_encoders(trace)


def unused_encoders(trace: Trace) -> Iterator[Call]:
    """A call that encodes the run's images, for an autoencoder that only decoded, so that its encoder is compared
    too."""
    for component, recorded in trace.calls.items():
        methods = {call.method for call in recorded}
        if "decode" in methods and "encode" not in methods:
            yield Call(component, "", RecordedCall("encode", (2 * trace.images - 1,), {}))


def label(call: RecordedCall) -> str:
    """What distinguishes a call from others of the same method: the timestep, if it has one."""
    second = call.args[1] if len(call.args) > 1 else None
    return f"timestep {float(second):g}" if second is not None and np.ndim(second) == 0 else ""


def named(outputs: Any) -> dict[str, Any]:
    """Outputs by name: the fields of a named tuple, with the items of sequences as ``field i``; of a plain tuple as
    ``output i``."""
    if not hasattr(outputs, "_asdict"):
        several = isinstance(outputs, tuple | list)
        return {f"output {i}": member for i, member in enumerate(outputs)} if several else {"": outputs}
    found: dict[str, Any] = {}
    for name, value in outputs._asdict().items():
        word = name.replace("_", " ")
        if isinstance(value, tuple | list):
            found |= {f"{word} {i}": member for i, member in enumerate(value)}
        elif value is not None:
            found[word] = value
    return found


@functools.partial(jax.jit, static_argnames=("method", "flags", "model"))
def apply(params: Any, args: Any, kwargs: Any, *, method: str, flags: tuple[tuple[str, bool], ...], model: Any) -> Any:
    """Our network's outputs, compiled once per network, flags and shape."""
    return model.apply({"params": params}, *args, method=method, **kwargs, **dict(flags))


def run_ours(call: Call, model: Any, params: Any) -> Outputs:
    """Our outputs as float32, with matrix products in full precision."""
    recorded = call.recorded
    flags, arrays = split_flags(recorded.kwargs)
    static = {"method": recorded.method, "flags": tuple(flags.items()), "model": autoencoder(model)}
    with jax.default_matmul_precision("highest"):
        outputs = apply(params, recorded.args, arrays, **static)
    return {name: np.asarray(value, np.float32) for name, value in named(outputs).items()}


def run_theirs(call: Call, network: TorchNetwork) -> Outputs:
    """PyTorch's outputs as float32."""
    outputs = network.run(call.recorded.method, call.recorded.args, call.recorded.kwargs)
    return {name: to_numpy(value) for name, value in named(outputs).items()}
