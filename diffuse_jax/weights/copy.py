"""Copying a strided view of a file into memory of its own, in a new order of axes and a new dtype."""

from __future__ import annotations

import math
import mmap

import numpy as np

ALIGNMENT = 64
"""JAX on CPU takes over a NumPy buffer without copying it if it starts at a multiple of this many bytes."""

HUGE = 1 << 21
"""Buffers of at least this many bytes get huge pages: faulting in 4 KiB pages costs as much as the copy itself."""


def compact(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A C-ordered, aligned copy of an array in ``dtype``; one pass, no intermediate array."""
    out = empty(view.shape, dtype)
    np.copyto(out, view, casting="unsafe")
    return out


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that JAX can adopt."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE:
        raw = np.empty(size + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + size].view(dtype).reshape(shape)
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8).view(dtype).reshape(shape)
