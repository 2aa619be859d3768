"""The pipelines of this library on PyTorch, and comparisons of both sides: the only part that imports torch.

A public name is imported when it is first used, so that the command line can offer ``parity`` where torch is missing.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Comparison": "report",
    "compare": "report",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import ``name`` from its module on first use and remember it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
