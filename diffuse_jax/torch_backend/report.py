"""The differences between two arrays, as rows of a table and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.columns import in_columns
from diffuse_jax.weights import write_json


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One row: what was compared, how much the two sides differ, and how much they may.

    Attributes:
      name: what was compared, for example ``unet, timestep 981``.
      shape: shape of the arrays.
      max_error, mean_error: maximum and mean absolute difference; infinite if one side is not finite.
      relative_error: Euclidean norm of the difference over that of the reference; see :func:`compare`.
      tolerance: maximum relative error that is accepted.
    """

    name: str
    shape: tuple[int, ...]
    max_error: float
    mean_error: float
    relative_error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the relative error is within the tolerance."""
        return self.relative_error <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """The fields and the verdict; an infinite error is null, because JSON has no infinity."""
        fields = dataclasses.asdict(self) | {"shape": list(self.shape), "ok": self.ok}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def compare(name: str, ours: Any, theirs: Any, tolerance: float, floor: float = 0.0) -> Comparison:
    """Compare two arrays (or numbers) in float64; ``theirs`` is the reference.

    Args:
      name: what is compared.
      ours, theirs: two arrays of the same shape.
      tolerance: maximum relative error that is accepted.
      floor: minimum for the norm that the difference is divided by, for arrays that consist of rounding errors.

    Raises:
      ValueError: the shapes differ.
    """
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{name}: the shapes differ, {list(a.shape)} here and {list(b.shape)} in PyTorch")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Comparison(name, a.shape, math.inf, math.inf, math.inf, tolerance)
    difference = np.abs(a - b)
    distance, size = float(np.linalg.norm(difference)), max(float(np.linalg.norm(b)), floor)
    relative = distance / size if size else math.inf if distance else 0.0
    largest, mean = float(difference.max(initial=0.0)), float(difference.mean()) if difference.size else 0.0
    return Comparison(name, a.shape, largest, mean, relative, tolerance)


HEADER = ("compared", "shape", "max error", "mean error", "relative", "tolerance", "verdict")


def table(rows: Iterable[Comparison]) -> str:
    """The rows in aligned columns under a header, one line each."""
    number = lambda x: f"{x:.2e}"
    cells: list[Sequence[str]] = [HEADER]
    for row in rows:
        errors = map(number, (row.max_error, row.mean_error, row.relative_error))
        shape = "x".join(map(str, row.shape)) or "1"
        cells.append((row.name, shape, *errors, f"{row.tolerance:g}", "same" if row.ok else "DIFFERENT"))
    return in_columns(cells, [name != HEADER[0] for name in HEADER])


def write_report(path: Path, rows: Iterable[Comparison], **context: Any) -> Path:
    """Write ``{**context, "ok": ..., "rows": [...]}`` as JSON, atomically, and return ``path``.

    Args:
      path: the file to write.
      rows: all comparisons.
      **context: what was compared: model, device, dtype, versions.
    """
    rows = list(rows)
    write_json(path, context | {"ok": all(row.ok for row in rows), "rows": [row.to_json() for row in rows]})
    return path
