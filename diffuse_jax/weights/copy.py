"""Copying a strided view of a file into memory of its own, in a new order of axes and a new dtype."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import numpy as np

from diffuse_jax.errors import bad

ALIGNMENT = 64
"""JAX on CPU takes over a NumPy buffer without copying it if it starts at a multiple of this many bytes."""

LARGE = 1 << 21
"""Buffers of at least this many bytes are mapped, with ordinary pages: NumPy's own ask for huge pages, and on a machine
whose memory is full of file pages the kernel spends twice as long making room for those as on everything else here."""

BLOCK = 64
"""Columns of the result that are filled at a time when axes move; their sources then stay in the processor's cache."""


class Pages(mmap.mmap):
    """The pages of a mapped file, which know what the file is called."""

    path: Path


def compact(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A C-ordered, aligned copy of an array in ``dtype``; one pass, no intermediate array.

    Raises:
      WeightsError: the view is of a mapped file that has become shorter.
    """
    check_whole(view)
    out = empty(view.shape, dtype)
    width = view.shape[-1] if view.ndim > 1 and abs(view.strides[-1]) > view.itemsize else 0
    if width <= BLOCK or out.nbytes < LARGE:
        np.copyto(out, view, casting="unsafe")
        return out
    for start in range(0, width, BLOCK):
        np.copyto(out[..., start : start + BLOCK], view[..., start : start + BLOCK], casting="unsafe")
    return out


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that JAX can adopt."""
    size = math.prod(shape) * dtype.itemsize
    if size >= LARGE and hasattr(mmap, "MAP_PRIVATE"):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(pages, np.uint8).view(dtype).reshape(shape)
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def forget(view: np.ndarray) -> None:
    """Give the pages of a mapped file that a view covers back to the system; using the view again reads them again."""
    whole, pages = _mapped(view)
    if pages is None or not hasattr(mmap, "MADV_DONTNEED") or view.nbytes < mmap.PAGESIZE:
        return
    low, high = np.lib.array_utils.byte_bounds(view)
    start = (low - whole.ctypes.data) // mmap.PAGESIZE * mmap.PAGESIZE
    pages.madvise(mmap.MADV_DONTNEED, start, high - whole.ctypes.data - start)


def check_whole(view: np.ndarray) -> None:
    """Refuse a view of a mapped file that has become shorter: reading what is not there any more ends the process.

    Raises:
      WeightsError: naming the file.
    """
    _, pages = _mapped(view)
    if pages is not None and pages.size() < len(pages):
        raise bad(
            pages.path,
            f"has become shorter while it was being read ({pages.size()} of {len(pages)} bytes); is another process "
            "writing it?",
        )


def _mapped(view: np.ndarray) -> tuple[np.ndarray, Pages | None]:
    """The array that a view is of, and the pages of its file, if it is mapped."""
    whole = view
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    pages = whole.base.obj if isinstance(whole.base, memoryview) else whole.base
    return whole, pages if isinstance(pages, Pages) else None
