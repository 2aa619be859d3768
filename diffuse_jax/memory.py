"""Memory of compiled programs and of devices, where the backend reports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh


def analysed(program: Any) -> Any | None:
    """The compiler's sizes of a compiled program on a device, in bytes; None if it does not say."""
    try:
        return program.memory_analysis()
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return None


def statistics(mesh: Mesh) -> list[Mapping[str, int]] | None:
    """``bytes_limit``, ``bytes_in_use`` and the like of this process's devices; None if one of them does not say."""
    found = [device.memory_stats() for device in mesh.local_devices]
    return found if all(one and "bytes_limit" in one for one in found) else None
