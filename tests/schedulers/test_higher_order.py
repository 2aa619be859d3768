"""Heun, DPM-Solver-2, LMS and iPNDM: what parity with PyTorch does not show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffuse_jax import schedulers
from diffuse_jax.schedulers.lms import lagrange_integrals
from diffuse_jax.schedulers.table import Table

STD = 0.6
"""Standard deviation of the data."""


def gaussian_end(table: Table) -> float:
    """Where the best network for data N(0, STD^2) takes a sample of one standard deviation, in those of the end.

    The probability-flow ODE takes it to 1.
    """
    rows = iter(zip(table.levels, table.to_x0, table.input_scale, strict=False))

    def model(x: np.ndarray, t: float) -> np.ndarray:
        (alpha, sigma), (of_sample, of_output), scale = next(rows)
        x0 = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * x / scale
        return (x0 - of_sample * x / scale) / of_output

    std = np.hypot(table.levels[:, 0] * STD, table.levels[:, 1])
    return table.run(model, np.array([[std[0]]]))[-1].item() / std[-1]


def error(scheduler: Any, n: int, **options: Any) -> float:
    """Relative error between two levels where the data still has noise (``table.levels`` calls the end clean)."""
    table = scheduler.table(sigmas=list(np.geomspace(8.0, 0.05, n + 1)), **options)
    return abs(gaussian_end(table) * STD / np.hypot(STD, 0.05) - 1)


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("HeunDiscreteScheduler", {}, 2),
        ("KDPM2DiscreteScheduler", {}, 2),
        ("LMSDiscreteScheduler", {"order": 1}, 1),
        ("LMSDiscreteScheduler", {"order": 2}, 2),
        ("LMSDiscreteScheduler", {"order": 3}, 3),
        ("LMSDiscreteScheduler", {}, 3),
    ],
)
def test_order_of_accuracy(name: str, options: dict[str, int], order: int) -> None:
    """LMS starts with steps of lower order, so that of order 4 does not show its order here."""
    scheduler = getattr(schedulers, name)()
    coarse, fine = error(scheduler, 80, **options), error(scheduler, 160, **options)
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_more_slopes_are_more_accurate_once_available() -> None:
    errors = [error(schedulers.LMSDiscreteScheduler(), 400, order=k) for k in (1, 2, 4)]
    assert errors[0] > 20 * errors[1]
    assert errors[1] > 2 * errors[2]


def test_lagrange_integrals_integrate_polynomials_exactly() -> None:
    nodes = np.array([2.0, 2.7, 3.1, 4.6, 5.0, 6.2])
    for count in range(1, 7):
        weights = lagrange_integrals(nodes[:count], 1.3)
        for power in range(count):
            exact = (1.3 ** (power + 1) - 2.0 ** (power + 1)) / (power + 1)
            assert weights @ nodes[:count] ** power == pytest.approx(exact, rel=1e-10)
    np.testing.assert_allclose(lagrange_integrals(np.array([3.0, 4.0, 5.0, 6.0]), 2.0) * -24, [55, -59, 37, -9])


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"])
def test_end_point_of_a_gaussian(name: str) -> None:
    scheduler = getattr(schedulers, name)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert gaussian_end(scheduler.table(100)) == pytest.approx(1.0, rel=0.01)


def test_end_point_of_a_gaussian_in_continuous_time() -> None:
    errors = [abs(gaussian_end(schedulers.IPNDMScheduler().table(n, as_published=True)) - 1) for n in (50, 100)]
    assert errors[1] < errors[0] / 2
    assert errors[1] < 1e-4


def test_a_single_step_from_pure_noise_returns_nothing_or_the_prediction(rng: np.random.Generator) -> None:
    x, out = rng.standard_normal((2, 1, 5))
    for as_published, wanted in {False: 0 * x, True: -out}.items():
        end = schedulers.IPNDMScheduler().table(1, as_published=as_published).run(lambda *_: out, x)[-1]
        np.testing.assert_allclose(end, wanted, atol=1e-15)


def test_a_late_start_leaves_out_slopes_or_lowers_the_order() -> None:
    scheduler = schedulers.LMSDiscreteScheduler(use_karras_sigmas=True)
    late, published = (scheduler.table(20, strength=0.5, as_published=published) for published in (False, True))
    levels = published.levels[:2, 1]
    of_slope = [(table.rows[0, 0, :3] @ (0, 0, 1)) / levels[0] for table in (late, published)]
    assert of_slope[1] == pytest.approx((levels[1] - levels[0]) / levels[0]), "an Euler step"
    assert abs(of_slope[0]) > 1.5 * abs(of_slope[1]), "the first weight of order 4 alone"
    np.testing.assert_allclose(late.rows[4:], published.rows[4:])


@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"])
def test_inpainting_at_midpoints(name: str) -> None:
    """A known image has the level at the end of the step there, or that of the sample."""
    scheduler = getattr(schedulers, name)(beta_start=0.00085)
    table, published = scheduler.table(6), scheduler.table(6, as_published=True)
    np.testing.assert_array_equal(published.known, published.levels)
    np.testing.assert_allclose(table.known[1:-1:2], table.levels[2::2])
    np.testing.assert_array_equal(table.known[::2], table.levels[::2])
    assert table.cut(3).known.shape == table.cut(3).levels.shape


def test_ancestral_noise_keeps_the_variance() -> None:
    table = schedulers.KDPM2AncestralDiscreteScheduler(use_karras_sigmas=True).table(200)
    n = len(table)
    start = np.zeros((n + 1, 1))
    start[-1] = np.hypot(STD, table.levels[0, 1])
    rows = iter(zip(table.levels, table.input_scale, strict=False))

    def model(x: np.ndarray, t: float) -> np.ndarray:
        (_, sigma), scale = next(rows)
        return sigma / (STD**2 + sigma**2) * x / scale

    response = table.run(model, start, list(np.eye(n, n + 1)[:, :, None]))[-1]
    assert np.sqrt((response**2).sum()) == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_a_run_stops_between_steps(name: str, rng: np.random.Generator) -> None:
    """denoising_end never leaves a step half done: the second evaluation may lie past it."""
    scheduler = getattr(schedulers, name)()
    x, noise = rng.standard_normal((1, 5)), list(rng.standard_normal((40, 1, 5)))
    model = lambda x, t: np.sin(x + t / 300)
    whole = scheduler.table(20).run(model, x, noise)
    for share in (0.62, 0.65, 0.7, 0.71):
        first, second = scheduler.table(20, denoising_end=share), scheduler.table(20, denoising_start=share)
        assert len(first) + len(second) == len(whole) - 1
        assert len(first) % 2 == 0
        middle = first.run(model, x, noise)[-1]
        np.testing.assert_allclose(second.run(model, middle, noise[len(first) :])[-1], whole[-1], rtol=1e-10)


def test_evaluations_per_step() -> None:
    for name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler"):
        scheduler = getattr(schedulers, name)()
        assert len(scheduler.table(10)) == 19
        assert len(scheduler.table(10, strength=0.5)) == 9
        assert len(scheduler.table(1)) == 1
        assert len(scheduler.table(sigmas=[9.0, 3.0, 1.0])) == 4


def test_continuous_time_is_noised_at_any_time() -> None:
    scheduler = schedulers.IPNDMScheduler()
    x0, noise, t = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32), np.array([0.0, 0.5, 1.0], np.float32)
    np.testing.assert_allclose(scheduler.add_noise(x0, noise, t)[:, 0], [1, np.sqrt(0.5), 0], atol=1e-6)
    np.testing.assert_allclose(scheduler.velocity(x0, noise, t)[:, 0], [0, -np.sqrt(0.5), -1], atol=1e-6)
    assert scheduler.train_levels().shape == (1000, 2)
    with pytest.raises(AttributeError, match="not made of betas"):
        _ = scheduler.alpha_bar


@pytest.mark.parametrize(
    ("scheduler", "request_", "message"),
    [
        (schedulers.LMSDiscreteScheduler(), {"num_inference_steps": 5, "order": 7}, "from 1 to 6, got 7"),
        (
            schedulers.LMSDiscreteScheduler(),
            {"num_inference_steps": 5, "order": 2.5},
            "order must be an integer .* got 2.5",
        ),
        (schedulers.IPNDMScheduler(), {"sigmas": [1.0, 0.0]}, "give timesteps= instead"),
        (schedulers.IPNDMScheduler(), {"timesteps": [1.5, 0.5]}, "between 0 and 1, got 1.5"),
        (
            schedulers.IPNDMScheduler(trained_betas=(1.0, 0.5, 0.0), num_train_timesteps=3),
            {"num_inference_steps": 3},
            "trained_betas has the 3 sigmas of 2 steps, 3 steps were asked for",
        ),
        (schedulers.HeunDiscreteScheduler(use_karras_sigmas=True), {"timesteps": [5, 1]}, "cannot take timesteps="),
        (schedulers.KDPM2DiscreteScheduler(), {"num_inference_steps": 5, "s_churn": 1}, "no option s_churn"),
    ],
)
def test_impossible_requests(scheduler: Any, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheduler.table(**request_)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"])
def test_two_spacings_exclude_each_other(name: str) -> None:
    with pytest.raises(ValueError, match="only one of"):
        getattr(schedulers, name)(use_karras_sigmas=True, use_exponential_sigmas=True)
