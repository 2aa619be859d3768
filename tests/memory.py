"""The memory of a test process: compiled programs stay as long as their process, which would grow to 14 GB."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

import jax

MUCH = 3 * 2**30
"""In bytes."""


def resident() -> int:
    """The memory of this process in bytes; 0 where it is not known."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * resource.getpagesize() if path.exists() else 0


def free_programs() -> None:
    """Forget all compiled programs if there are many; those that are needed again are in JAX's cache on disk."""
    if resident() > MUCH:
        jax.clear_caches()
        if programs := sys.modules.get("diffuse_jax.pipelines.programs"):
            programs.PROGRAMS.clear()
    gc.collect()
