"""The memory of a test process, which would grow to 14 GB: compiled programs stay as long as their process, and the C
library keeps what the compiler has freed."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import jax

from benchmarks.common import trim_memory

MUCH = 3 * 2**30
"""In bytes."""


def resident() -> int:
    """The memory of this process in bytes; 0 where it is not known."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * resource.getpagesize() if path.exists() else 0


def free_programs() -> None:
    """Return freed memory to the system. If much is still in use, also forget all compiled programs; those that are
    needed again are in JAX's cache on disk."""
    trim_memory()
    if resident() > MUCH:
        jax.clear_caches()
        if programs := sys.modules.get("diffuse_jax.pipelines.programs"):
            programs.PROGRAMS.clear()
        trim_memory()
