"""Shifts of flow matching levels."""

from __future__ import annotations

import numpy as np
import pytest

from diffuse_jax.schedulers import flow


def test_shift_keeps_the_ends_and_multiplies_the_noise_to_signal_ratio() -> None:
    sigmas = np.linspace(0, 1, 9)
    np.testing.assert_array_equal(flow.shift(sigmas, 3.0)[[0, -1]], [0, 1])
    inner = sigmas[1:-1]
    moved = flow.shift(inner, 3.0)
    np.testing.assert_allclose(moved / (1 - moved), 3 * inner / (1 - inner))
    np.testing.assert_allclose(flow.shift(moved, 1 / 3), inner)


def test_shift_factor() -> None:
    assert flow.shift_factor("X", 3.0, dynamic=False) == 3.0
    assert flow.shift_factor("X", 3.0, dynamic=True, mu=1.15) == pytest.approx(np.exp(1.15))
    assert flow.shift_factor("X", 3.0, dynamic=True, kind="linear", mu=1.15) == 1.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic": True}, r"X has use_dynamic_shifting=True and needs plan\(..., mu=\)"),
        ({"dynamic": False, "mu": 1.0}, "got mu=1 but has use_dynamic_shifting=False"),
        ({"dynamic": True, "mu": -1.0, "kind": "linear"}, "positive factor, a mu=-1 with time_shift_type='linear'"),
        ({"dynamic": False, "static": 0.0}, "a shift of 0 means 0"),
    ],
)
def test_impossible_shifts(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flow.shift_factor("X", options.pop("static", 1.0), **options)


def test_mu_runs_through_its_two_points() -> None:
    assert flow.mu_of_length(256) == 0.5
    assert flow.mu_of_length(4096) == pytest.approx(1.15)
    assert flow.mu_of_length(20, base_length=10, max_length=30, base_shift=1.0, max_shift=2.0) == 1.5


def test_stretched_levels_end_at_the_terminal_one() -> None:
    sigmas = np.array([1.0, 0.7, 0.3])
    stretched = flow.stretch_to_terminal(sigmas, 0.1)
    np.testing.assert_allclose(stretched, [1.0, 1 - 0.3 * 0.9 / 0.7, 0.1])
    np.testing.assert_array_equal(flow.stretch_to_terminal(np.array([1.0]), 0.1), [1.0])


def test_training_levels() -> None:
    np.testing.assert_allclose(flow.training_sigmas(4), [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(flow.training_sigmas(4, 2.0), flow.shift(np.array([0.25, 0.5, 0.75, 1.0]), 2.0))
    np.testing.assert_allclose(flow.training_levels(4)[[0, 1, 4]], [[1, 0], [0.75, 0.25], [0, 1]])
