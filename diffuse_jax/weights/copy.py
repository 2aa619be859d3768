"""Copying a strided view of a file to memory, with a new axis order and a new dtype."""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.errors import bad
from diffuse_jax.messages import brief

ALIGNMENT = 64
"""JAX on CPU adopts a NumPy buffer without copying it if its address is a multiple of this many bytes."""

LARGE = 1 << 21
"""Buffers of at least this many bytes are mapped with ordinary pages. NumPy's allocator asks for huge pages, and if
memory is full of cached file pages, the kernel spends more time freeing room for those than all other work here
takes."""

BLOCK = 64
"""Number of columns that are filled at a time when axes are permuted, so that their sources stay in the CPU cache."""


class Pages(mmap.mmap):
    """A mapped file that knows its path."""

    path: Path


def compact(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A C-ordered, aligned copy of an array in ``dtype``, in one pass and without an intermediate array.

    Raises:
      WeightsError: the view is of a mapped file that has been truncated.
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
    """An uninitialised array that JAX can adopt without copying."""
    size = math.prod(shape) * dtype.itemsize
    if size >= LARGE and hasattr(mmap, "MAP_PRIVATE"):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(pages, np.uint8).view(dtype).reshape(shape)
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def forget(view: np.ndarray) -> None:
    """Release the pages of a mapped file that a view covers; using the view again reads them again."""
    whole, pages = _mapped(view)
    if pages is None or not hasattr(mmap, "MADV_DONTNEED") or view.nbytes < mmap.PAGESIZE:
        return
    low, high = np.lib.array_utils.byte_bounds(view)
    start = (low - whole.ctypes.data) // mmap.PAGESIZE * mmap.PAGESIZE
    pages.madvise(mmap.MADV_DONTNEED, start, high - whole.ctypes.data - start)


def check_whole(view: np.ndarray) -> None:
    """Check that the mapped file of a view has not been truncated, because reading beyond its end kills the process.

    Raises:
      WeightsError: it has; the message names the file.
    """
    _, pages = _mapped(view)
    if pages is not None and pages.size() < len(pages):
        raise bad(
            pages.path,
            f"became shorter while it was being read ({pages.size()} of {len(pages)} bytes); is another process "
            "writing it?",
        )


def _mapped(view: np.ndarray) -> tuple[np.ndarray, Pages | None]:
    """The base array of a view, and its mapped file if there is one."""
    whole = view
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    pages = whole.base.obj if isinstance(whole.base, memoryview) else whole.base
    return whole, pages if isinstance(pages, Pages) else None


def refuse_not_finite(path: Path | str, name: Any, array: np.ndarray) -> None:
    """Refuse a tensor of a file with values that are not finite in float32: one of them makes every image NaN.

    Raises:
      WeightsError: it has NaN or infinity, or its mapped file has been truncated.
    """
    check_whole(array)
    if not np.isfinite(array.astype(np.float32, copy=False)).all():
        raise bad(path, f"{brief(name)} holds NaN or infinity; the file is damaged, or its training diverged")
