"""When two methods can share a compiled program: a comparison that is stricter than Python's ``==``.

In Python, 1, True and 1.0 are equal, and so are 0.0 and -0.0; NaN is not equal to itself, and dataclasses compare only
their fields. All of these values are compiled into a program.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import numpy as np

from diffuse_jax.config import Config
from diffuse_jax.kernels import current_platform
from diffuse_jax.models import Model
from diffuse_jax.models.intercept import layer_changes

FLAX_MODULE: type = Model.__mro__[1]


def identity(value: Any) -> Hashable:
    """The comparison key of a method, a part or a value in it; two keys are equal only if both compute the same.

    Dataclasses are compared by class and fields (except fields with ``compare=False``), numbers by type and bits,
    tuples and frozen sets by their elements, and everything else with Python's ``==``.

    Raises:
      TypeError: the value cannot be compared, because it is not frozen or has attributes besides its fields.
    """
    kind: Any = type(value)
    if isinstance(value, float | complex | np.generic):
        return kind, repr(value)  # 0.0 and -0.0 differ, nan equals nan
    if isinstance(value, tuple):
        return kind, tuple([identity(item) for item in value])
    if isinstance(value, frozenset):
        return kind, frozenset([identity(item) for item in value])
    parameters = getattr(kind, "__dataclass_params__", None)
    if parameters is None or isinstance(value, type):
        hash(value)
        return kind, value
    if kind.__hash__ is None:
        raise TypeError(f"unhashable type: {kind.__name__!r}")
    if not parameters.eq:
        return kind, value
    if extra := vars(value).keys() - _known(kind) if hasattr(value, "__dict__") else ():
        raise TypeError(f"{', '.join(sorted(extra))} is stored outside its fields")
    return kind, tuple([identity(getattr(value, name)) for name in _compared(kind)])


@functools.cache
def _compared(kind: type) -> tuple[str, ...]:
    return tuple([f.name for f in dataclasses.fields(kind) if f.compare])


@functools.cache
def _known(kind: type) -> frozenset[str]:
    """Attributes that hold no information beyond the fields: the fields, cached properties and Flax's internal ones."""
    computed = {name for name, _ in inspect.getmembers_static(kind, lambda x: isinstance(x, functools.cached_property))}
    internal = vars(Model(Config())) if issubclass(kind, FLAX_MODULE) else ()
    return frozenset({f.name for f in dataclasses.fields(kind)} | computed | {*internal})


SETTINGS = (
    "jax_allow_f16_reductions",
    "jax_debug_nans",
    "jax_default_device",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_custom_prng",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_random_seed_offset",
    "jax_threefry_partitionable",
    "jax_use_shardy_partitioner",
)
"""JAX settings that affect what a function compiles to, or whether it compiles; not every release has all of them."""


class Context(NamedTuple):
    """The context of a call that is compiled into a program.

    Attributes:
      settings: the values of :data:`SETTINGS`.
      platform: the platform that kernels are chosen for.
      mesh: the mesh set by ``jax.set_mesh``.
      changes: changes to layers; see :func:`~diffuse_jax.models.intercept.layer_changes`.
    """

    settings: tuple[Any, ...]
    platform: str
    mesh: Any
    changes: tuple[Any, ...]

    @classmethod
    def now(cls) -> Context:
        """The current context of this thread."""
        settings = tuple([getattr(jax.config, name, None) for name in SETTINGS])
        return cls(settings, current_platform(), jax.sharding.get_abstract_mesh(), layer_changes())
