"""When two methods are the same, so that one compiled program serves both: stricter than Python's ``==``.

To Python 1, True and 1.0 are equal, as are 0.0 and -0.0, a NaN equals nothing, and a dataclass compares its fields
only. A program has every one of these compiled in.
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
    """What a method, a part or a value in it is compared by: equal for two of them only if they compute the same.

    Dataclasses are compared by class and fields (without those that are declared ``compare=False``), numbers by type
    and bits, tuples and frozen sets by what is in them, anything else as Python does.

    Raises:
      TypeError: it cannot be compared: it is not frozen, or keeps something outside of its fields.
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
        raise TypeError(f"{', '.join(sorted(extra))} is kept outside of its fields")
    return kind, tuple([identity(getattr(value, name)) for name in _compared(kind)])


@functools.cache
def _compared(kind: type) -> tuple[str, ...]:
    return tuple([f.name for f in dataclasses.fields(kind) if f.compare])


@functools.cache
def _known(kind: type) -> frozenset[str]:
    """Attributes of an instance that say nothing beyond its fields: these, what is computed of them, Flax's own."""
    computed = {name for name, _ in inspect.getmembers_static(kind, lambda x: isinstance(x, functools.cached_property))}
    own = vars(Model(Config())) if issubclass(kind, FLAX_MODULE) else ()
    return frozenset({f.name for f in dataclasses.fields(kind)} | computed | {*own})


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
"""Settings of JAX that change what a function compiles to, or whether it does; no release need have all of them."""


class Context(NamedTuple):
    """What is active around a call and is compiled into a program.

    Attributes:
      settings: values of :data:`SETTINGS`.
      platform: the one that kernels are chosen for.
      mesh: the one of ``jax.set_mesh``.
      changes: of layers; see :func:`~diffuse_jax.models.intercept.layer_changes`.
    """

    settings: tuple[Any, ...]
    platform: str
    mesh: Any
    changes: tuple[Any, ...]

    @classmethod
    def now(cls) -> Context:
        """The context of this thread."""
        settings = tuple([getattr(jax.config, name, None) for name in SETTINGS])
        return cls(settings, current_platform(), jax.sharding.get_abstract_mesh(), layer_changes())
