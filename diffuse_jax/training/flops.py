"""How much arithmetic a training step is, and how much of what the device could do that uses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("TPU v2", 22.5e12),
    ("TPU v3", 61.5e12),
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA A10G", 70e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L4", 121e12),
)
"""Start of a device's kind -> bfloat16 operations per second without sparsity, as its maker states them, for one
``jax.Device`` (a TPU v2 or v3 chip has two). First match counts."""


def peak_flops(device: jax.Device) -> float | None:
    """Operations per second that the device could do in bfloat16; None where that is not known."""
    return next((peak for kind, peak in PEAK_FLOPS if device.device_kind.startswith(kind)), None)


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Operations of the matrix products and convolutions of ``function(*args)``, two for each multiply-add.

    An operation on the same values counts once, so what is computed again to save memory (``jax.checkpoint``) does not
    count, and a gradient is as much work under every remat policy: this is the numerator of "model FLOPs utilisation"
    (Chowdhery et al. 2022, appendix B). Nothing is compiled or run. A loop whose length is not known before it runs
    counts as one turn.

    Args:
      function: anything that can be traced; the gradient of a loss, for a training step.
      *args: arrays or their shapes.
    """
    return _Count().of(jax.make_jaxpr(function)(*args))


class _Count:
    """Gives every value of a traced program a number, the same to the results of the same operation on the same."""

    def __init__(self) -> None:
        self.total = 0.0
        self._numbers: dict[Any, int] = {}

    def of(self, program: core.ClosedJaxpr) -> float:
        self.program(program, [self.number(("argument", i)) for i in range(len(program.jaxpr.invars))])
        return self.total

    def number(self, key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def program(self, program: core.ClosedJaxpr | core.Jaxpr, arguments: list[int]) -> list[int]:
        """Count a program; the numbers of its results."""
        jaxpr, constants = (program.jaxpr, program.consts) if isinstance(program, core.ClosedJaxpr) else (program, ())
        known = dict(zip(jaxpr.invars, arguments, strict=True))
        known |= {var: self.number(("constant", id(c))) for var, c in zip(jaxpr.constvars, constants, strict=True)}
        read = lambda v: self.number(("literal", str(v.val))) if isinstance(v, core.Literal) else known[v]
        for eqn in jaxpr.eqns:
            known |= dict(zip(eqn.outvars, self.operation(eqn, [read(v) for v in eqn.invars]), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def operation(self, eqn: core.JaxprEqn, arguments: list[int]) -> list[int]:
        name, inner = eqn.primitive.name, _programs(eqn.params)
        if name not in ("cond", "scan", "while", "pallas_call") and len(inner) == 1:
            return self.program(inner[0], arguments)
        counts = [_Count().of(_closed(sub)) for sub in inner]
        # A loop that is computed again also hands out what the backward pass needs, so it is known by its work instead
        # of its program, and its results by their shapes.
        key = (name, *arguments, *counts) if counts else (name, *arguments, str(eqn.params))
        if key not in self._numbers:
            self.number(key)
            self.total += _operations(eqn, counts)
        shapes = [str(v.aval) for v in eqn.outvars]
        return [self.number((key, shape, shapes[:i].count(shape))) for i, shape in enumerate(shapes)]


def _operations(eqn: core.JaxprEqn, inner: list[float]) -> float:
    """Of one operation, given those of the programs inside it."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = _shape(eqn.invars[0])
        return 2.0 * math.prod(_shape(eqn.outvars[0])) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        numbers, kernel = params["dimension_numbers"], _shape(eqn.invars[1])
        window = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])
        # Of a dilated input, as the gradient of a strided convolution has it, only one in so many numbers is not zero.
        return 2.0 * math.prod(_shape(eqn.outvars[0])) * window / math.prod(params["lhs_dilation"])
    if name == "cond":
        return max(inner)
    turns = {"scan": lambda: params["length"], "pallas_call": lambda: math.prod(params["grid_mapping"].grid)}
    return sum(inner) * turns.get(name, lambda: 1)()


def _shape(value: Any) -> tuple[int, ...]:
    return value.aval.shape


def _programs(params: dict[str, Any]) -> list[core.ClosedJaxpr | core.Jaxpr]:
    """The programs inside an operation's parameters."""
    flat = [item for value in params.values() for item in (value if isinstance(value, tuple | list) else (value,))]
    return [item for item in flat if isinstance(item, core.ClosedJaxpr | core.Jaxpr)]


def _closed(program: core.ClosedJaxpr | core.Jaxpr) -> core.ClosedJaxpr:
    return program if isinstance(program, core.ClosedJaxpr) else core.ClosedJaxpr(program, ())
