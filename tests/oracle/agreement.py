"""Whether a pipeline's images are PyTorch's; ``benchmarks/pipeline_parity.py`` makes a table of what was found."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

TOLERANCE = 0.02
"""Mean absolute difference over all pixels, in units of 1/255. What was asked for is 0.5; rounding needs far less."""


class Comparison(NamedTuple):
    """One comparison: the pipeline's class, the test, and the mean and largest difference in units of 1/255."""

    pipeline: str
    test: str
    mean: float
    largest: float


FOUND: list[Comparison] = []
"""Every comparison of this process that agreed, in order."""


def require_same(
    pipe: Any, ours: np.ndarray | Sequence[Any], wanted: np.ndarray | Sequence[Any], tolerance: float = TOLERANCE
) -> float:
    """Fail unless images of ``pipe``, in [0, 1], are PyTorch's up to a mean difference; returns that, in 1/255."""
    ours, wanted = np.asarray(ours, np.float64), np.asarray(wanted, np.float64)
    assert ours.shape == wanted.shape
    assert wanted.std() > 0.05, "an image without content proves nothing"
    differences = 255 * np.abs(ours - wanted)
    mean, name = float(differences.mean()), type(pipe).__name__
    assert mean < tolerance, f"the mean difference of {name} is {mean:.3g} of 255"
    FOUND.append(Comparison(name, os.environ.get("PYTEST_CURRENT_TEST", ""), mean, float(differences.max())))
    return mean
