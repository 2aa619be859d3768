"""The one exception of this package."""

from __future__ import annotations

from pathlib import Path


class WeightsError(ValueError):
    """Weights, or the folder, index or download that should hold them, cannot be used; the text names file and key."""


def bad(path: Path | str, problem: str) -> WeightsError:
    """An error that begins with the file it is about."""
    return WeightsError(f"{path}: {problem}")
