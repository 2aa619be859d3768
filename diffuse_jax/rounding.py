"""Numbers rounded up, so that few of them compile a program of their own. This module loads no JAX."""

from __future__ import annotations


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``, and at least 1."""
    return 1 << max(0, count - 1).bit_length()
