"""This library's pipelines on PyTorch, and comparisons of both sides; the only part that imports torch.

Public names are imported on first use, so the command line can offer ``parity`` even if torch is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffuse_jax.torch_backend.pipeline import from_pretrained
    from diffuse_jax.torch_backend.report import Comparison, compare

_HOME = {
    "Comparison": "report",
    "compare": "report",
    "from_pretrained": "pipeline",
}

__all__ = ["Comparison", "compare", "from_pretrained"]

NEEDED = ("torch", "diffusers")


def __getattr__(name: str) -> Any:
    """Import ``name`` from its module on first use and remember it.

    Raises:
      ImportError: PyTorch or diffusers is not installed; the message names the extra to install.
    """
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(load(_HOME[name]), name)
    return value


def load(module: str) -> Any:
    """Import a module of this package.

    Raises:
      ImportError: PyTorch or diffusers is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        raise ImportError(
            f"the PyTorch side needs {error.name}, which is not installed; install the extra:"
            ' pip install "diffusejax[torch]"'
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
