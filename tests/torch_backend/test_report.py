"""Rows of a comparison: what the errors mean, and that nothing that is not a number passes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from diffuse_jax.torch_backend import report


def test_errors_of_known_arrays() -> None:
    row = report.compare("x", [[3.0, 4.5]], [[3.0, 4.0]], tolerance=0.1)
    assert (row.shape, row.max_error, row.mean_error) == ((1, 2), 0.5, 0.25)
    assert row.relative_error == pytest.approx(0.5 / 5)  # the norm of (3, 4) is 5
    assert row.ok
    assert not report.compare("x", [[3.0, 4.5]], [[3.0, 4.0]], tolerance=0.09).ok


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_never_the_same(bad: float) -> None:
    row = report.compare("x", [1.0, bad], [1.0, bad], tolerance=1.0)
    assert not row.ok
    assert row.to_json()["max_error"] is None


def test_a_reference_of_zeros_must_be_met_exactly() -> None:
    assert report.compare("x", np.zeros(3), np.zeros(3), 0.0).ok
    assert report.compare("x", [1e-9], [0.0], 1.0).relative_error == math.inf


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"x: the shapes differ, \[2\] here and \[3\] in PyTorch"):
        report.compare("x", np.zeros(2), np.zeros(3), 1.0)


def test_table_and_json(tmp_path: Path) -> None:
    rows = [
        report.compare("loss", 1.0, 1.0, 1e-5),
        report.compare("unet, timestep 1", np.ones((2, 3)), np.zeros((2, 3)), 1e-4),
    ]
    header, first, second = report.table(rows).splitlines()
    assert header.split() == ["compared", "shape", "max", "error", "mean", "error", "relative", "tolerance", "verdict"]
    assert first.split() == ["loss", "1", "0.00e+00", "0.00e+00", "0.00e+00", "1e-05", "same"]
    assert second.endswith("DIFFERENT")
    assert len(header) == len(first) == len(second)
    data = json.loads(report.write_report(tmp_path / "deep" / "parity.json", rows, model="m").read_text())
    assert (data["model"], data["ok"], [row["ok"] for row in data["rows"]]) == ("m", False, [True, False])
    assert data["rows"][1]["relative_error"] is None
