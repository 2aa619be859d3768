"""Which platform a kernel is written out for, and the compiler options that go with it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import jax

_target = jax.make_user_context(default_value=None)


def target_platform(platform: str) -> AbstractContextManager[None]:
    """Choose kernels for ``platform`` ("cpu", "gpu" or "tpu") while tracing, whatever this process runs on.

    Needed to compile ahead of time for a machine that is not there, e.g. for a TPU slice from a CPU host. JAX's caches
    know about it: a function traced under one target is traced again under another.

    Example:
      >>> with target_platform("tpu"):
      ...     lowered = jax.jit(step).trace(*shapes).lower(lowering_platforms=("tpu",))

    Raises:
      ValueError: the platform is none of the three.
    """
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f'platform must be "cpu", "gpu" or "tpu", got {platform!r}')
    return _target(platform)


def current_platform() -> str:
    """What :func:`target_platform` says, else "cpu", "gpu" or "tpu" as where JAX puts new arrays."""
    if _target.value is not None:
        return _target.value
    config: Any = jax.config  # only some releases declare its options
    device = config.jax_default_device
    name = jax.default_backend() if device is None else getattr(device, "platform", device)
    return "gpu" if name in ("cuda", "rocm") else str(name)
