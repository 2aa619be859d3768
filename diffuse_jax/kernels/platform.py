"""Which platform kernels are chosen for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import jax

_target = jax.make_user_context(default_value=None)


def target_platform(platform: str) -> AbstractContextManager[None]:
    """Choose kernels for ``platform`` ("cpu", "gpu" or "tpu") while tracing, whatever this process runs on.

    Needed to compile ahead of time for hardware that is not attached, e.g. for a TPU slice on a CPU host. JAX's caches
    take it into account: a function traced under one target is traced again under another.

    Example:
      >>> with target_platform("tpu"):
      ...     lowered = jax.jit(step).trace(*shapes).lower(lowering_platforms=("tpu",))

    Raises:
      ValueError: the platform is not one of the three.
    """
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f'platform must be "cpu", "gpu" or "tpu", got {platform!r}')
    return _target(platform)


def current_platform() -> str:
    """The platform set by :func:`target_platform`, else that of JAX's default device: "cpu", "gpu" or "tpu"."""
    return attached_platform() if _target.value is None else _target.value


def attached_platform() -> str:
    """The platform of JAX's default device: "cpu", "gpu" or "tpu"."""
    config: Any = jax.config  # only some releases declare its options
    device = config.jax_default_device
    name = jax.default_backend() if device is None else getattr(device, "platform", device)
    return "gpu" if name in ("cuda", "rocm") else str(name)
