"""Networks with live adapters, whose arrays are among the program's arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from diffuse_jax.adapters import lora
from diffuse_jax.pipelines.method import Method, Net, Params, Part, Rows, Step

LORA, SCALE = "lora", "lora_scale"
"""The names of the adapters' trees and of their strength ``[B]`` among the parameters."""


@dataclasses.dataclass(frozen=True)
class AdaptedNet(Net):
    """A network with the adapters in ``params["lora"]``, which has a tree for each network."""

    @property
    def reads(self) -> tuple[str, ...]:
        return (*super().reads, LORA)

    def apply(self, params: Params, *args: Any, **options: Any) -> Any:
        with lora.live(params[LORA][self.name], params.get(SCALE, 1.0)):
            return super().apply(params, *args, **options)


@dataclasses.dataclass(frozen=True)
class AtScale(Part):
    """A part whose adapters act at a strength of ``lora_scale [B]``."""

    inner: Any

    @property
    def reads(self) -> tuple[str, ...]:
        return (SCALE,)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        return self.inner.prepare(params | {SCALE: rows[SCALE]}, rows, keys)

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        return self.inner(params | {SCALE: rows[SCALE]}, rows, x, step)


def adapted(part: Any, names: tuple[str, ...]) -> Any:
    """A part with :class:`AdaptedNet` in place of the networks of these names; itself if it has none."""
    return with_nets(part, lambda net: AdaptedNet(net.name, net.model, net.index) if net.name in names else net)


def with_nets(part: Any, change: Callable[[Net], Net]) -> Any:
    """A part with its networks, and those of the parts inside, changed."""

    def walk(value: Any) -> Any:
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(map(walk, value))
        return (
            change(value) if isinstance(value, Net) else with_nets(value, change) if isinstance(value, Part) else value
        )

    old = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    new = {name: walk(value) for name, value in old.items()}
    changed = {name: value for name, value in new.items() if value != old[name] or type(value) is not type(old[name])}
    return dataclasses.replace(part, **changed) if changed else part


def adapted_method(method: Method, names: tuple[str, ...]) -> Method:
    """A method whose networks of these names have live adapters, at the strength of the row ``lora_scale``."""

    def at_scale(part: Any) -> Any:
        new = adapted(part, names)
        return part if new == part else AtScale(new)

    return dataclasses.replace(
        method, denoiser=at_scale(method.denoiser), conditions=tuple(map(at_scale, method.conditions))
    )
