"""The number of floating-point operations of a training step, and the peak speed of devices."""

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
"""Prefix of a device kind -> bfloat16 operations per second without sparsity, according to the manufacturer, for one
``jax.Device`` (a TPU v2 or v3 chip has two). The first match counts."""


def peak_flops(device: jax.Device) -> float | None:
    """Peak speed of the device in bfloat16 operations per second; None if unknown."""
    return next((peak for kind, peak in PEAK_FLOPS if device.device_kind.startswith(kind)), None)


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Count the operations of the matrix products and convolutions of ``function(*args)``, two per multiply-add.

    The same operation on the same values counts once, so recomputation to save memory (``jax.checkpoint``) does not
    count, and a gradient has the same count under every remat policy: this is the numerator of "model FLOPs
    utilisation" (Chowdhery et al. 2022, appendix B). Nothing is compiled or run. A loop whose length is not known
    before it runs counts as one iteration.

    Args:
      function: anything that can be traced; for a training step, the gradient of its loss.
      *args: arrays or their shapes.
    """
    return _Count().of(jax.make_jaxpr(function)(*args))


class _Count:
    """Numbers the values of a traced program; results of the same operation on the same values share a number."""

    def __init__(self) -> None:
        self.total = 0.0
        self._numbers: dict[Any, int] = {}

    def of(self, program: core.ClosedJaxpr) -> float:
        self.program(program, [self.number(("argument", i)) for i in range(len(program.jaxpr.invars))])
        return self.total

    def number(self, key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def program(self, program: core.ClosedJaxpr | core.Jaxpr, arguments: list[int]) -> list[int]:
        """Count the operations of a program; returns the numbers of its results."""
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
        # A recomputed loop also returns what the backward pass needs, so a loop is identified by its operation count
        # instead of its program, and its results by their shapes.
        key = (name, *arguments, *counts) if counts else (name, *arguments, str(eqn.params))
        if key not in self._numbers:
            self.number(key)
            self.total += _operations(eqn, counts)
        shapes = [str(v.aval) for v in eqn.outvars]
        return [self.number((key, shape, shapes[:i].count(shape))) for i, shape in enumerate(shapes)]


def _operations(eqn: core.JaxprEqn, inner: list[float]) -> float:
    """The operation count of one equation, given the counts of the programs inside it."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = _shape(eqn.invars[0])
        return 2.0 * math.prod(_shape(eqn.outvars[0])) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        numbers, kernel = params["dimension_numbers"], _shape(eqn.invars[1])
        window = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])
        # In a dilated input, as in the gradient of a strided convolution, all but one in prod(dilation) elements are
        # zero.
        return 2.0 * math.prod(_shape(eqn.outvars[0])) * window / math.prod(params["lhs_dilation"])
    if name == "cond":
        return max(inner)
    turns = {"scan": lambda: params["length"], "pallas_call": lambda: math.prod(params["grid_mapping"].grid)}
    return sum(inner) * turns.get(name, lambda: 1)()


def _shape(value: Any) -> tuple[int, ...]:
    return value.aval.shape


def _programs(params: dict[str, Any]) -> list[core.ClosedJaxpr | core.Jaxpr]:
    """The programs among an equation's parameters."""
    flat = [item for value in params.values() for item in (value if isinstance(value, tuple | list) else (value,))]
    return [item for item in flat if isinstance(item, core.ClosedJaxpr | core.Jaxpr)]


def _closed(program: core.ClosedJaxpr | core.Jaxpr) -> core.ClosedJaxpr:
    return program if isinstance(program, core.ClosedJaxpr) else core.ClosedJaxpr(program, ())
