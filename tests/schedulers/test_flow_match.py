"""Samplers of flow matching: levels, the direction of time, noising, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffuse_jax.schedulers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    flow,
)

EVERY = [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler]
SHIFTED = [FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler]
STD = 0.6
"""Standard deviation of the data."""


def error(scheduler: Any, n: int, **options: Any) -> float:
    """Relative error of the end point for data N(0, STD^2): the best velocity keeps a sample's standard deviations."""
    table = scheduler.table(n, **options)
    rows = iter(zip(table.levels, table.to_x0, strict=False))

    def model(x: np.ndarray, t: float) -> np.ndarray:
        (alpha, sigma), (of_sample, of_output) = next(rows)
        return (alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * x - of_sample * x) / of_output

    return abs(table.run(model, np.ones((1, 1)))[-1].item() / STD - 1)


@pytest.mark.parametrize(
    ("scheduler", "order"),
    [
        (FlowMatchEulerDiscreteScheduler(), 1),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 1),
        (FlowMatchHeunDiscreteScheduler(), 2),
    ],
)
def test_order_of_accuracy(scheduler: Any, order: int) -> None:
    assert np.log2(error(scheduler, 100) / error(scheduler, 200)) == pytest.approx(order, abs=0.3)
    assert error(scheduler.replace(shift=3.0), 100) < 0.03


@pytest.mark.parametrize("cls", EVERY)
def test_levels(cls: Any) -> None:
    table = cls(num_train_timesteps=500).table(10)
    sigma = table.levels[:, 1]
    np.testing.assert_allclose(table.levels.sum(1), 1)
    np.testing.assert_allclose(sigma[[0, -2, -1]], [1, 1 / 500, 0])
    np.testing.assert_allclose(table.timesteps, 500 * sigma[:-1])
    assert table.init_scale == 1
    np.testing.assert_array_equal(table.input_scale, 1)
    assert len(cls().table(2000)) >= 2000


@pytest.mark.parametrize("cls", SHIFTED)
def test_shifts_and_spacings_follow_each_other(cls: Any) -> None:
    given = np.array([1.0, 0.6, 0.2])
    shifted = flow.shift(given, np.exp(0.7))
    options = {"use_dynamic_shifting": True, "shift_terminal": 0.15}
    levels = cls(**options).table(sigmas=given, mu=0.7).levels[:, 1]
    stretched = flow.stretch_to_terminal(shifted, 0.15)
    np.testing.assert_allclose(levels, [*stretched, 0])
    geometric = cls(use_exponential_sigmas=True, **options).table(sigmas=given, mu=0.7).levels[:, 1]
    np.testing.assert_allclose(geometric, [1, np.sqrt(0.15), 0.15, 0])


def test_mu_of_an_image() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=100, max_image_seq_len=200
    )
    assert scheduler.mu(150) == pytest.approx((0.5 + 1.15) / 2)
    small, large = (scheduler.table(4, mu=scheduler.mu(n)).levels[2, 1] for n in (100, 200))
    assert small < large


@pytest.mark.parametrize("cls", EVERY)
def test_explicit_timesteps_are_levels_as_they_are(cls: Any) -> None:
    times = [1000.0, 700.0, 333.3]
    table = cls(shift=3.0).table(timesteps=times)
    starts = np.append(True, ~table.inner[:-1])
    np.testing.assert_allclose(table.timesteps[starts], times)
    np.testing.assert_allclose(table.levels[:-1][starts, 1], np.array(times) / 1000)


@pytest.mark.parametrize("cls", EVERY)
def test_noising_and_velocity_at_any_time(cls: Any, rng: np.random.Generator) -> None:
    x0, noise = rng.standard_normal((2, 3, 4)).astype(np.float32)
    t = np.array([0.0, 250.5, 1000.0], np.float32)
    share = t[:, None] / 1000
    np.testing.assert_allclose(cls().add_noise(x0, noise, t), (1 - share) * x0 + share * noise, atol=1e-6)
    np.testing.assert_array_equal(cls().velocity(x0, noise, t), noise - x0)
    assert cls(num_train_timesteps=11).train_levels()[:, 1] == pytest.approx(np.linspace(0, 1, 11))


@pytest.mark.parametrize("cls", SHIFTED)
def test_inverted_time_is_the_same_run_with_other_timesteps(cls: Any, rng: np.random.Generator) -> None:
    forward, inverted = cls(shift=2.0), cls(shift=2.0, invert_sigmas=True)
    velocity = lambda x, t: np.sin(x + t / 400)
    start, noise = rng.standard_normal((1, 5)), list(rng.standard_normal((8, 1, 5)))
    a = forward.table(8).run(velocity, start, noise)
    b = inverted.table(8).run(lambda x, t: -velocity(x, 1000 - t), start, noise)
    np.testing.assert_allclose(b, a, atol=1e-12)
    x0, eps, t = *rng.standard_normal((2, 2, 3)).astype(np.float32), np.array([100.0, 900.0])
    np.testing.assert_allclose(inverted.add_noise(x0, eps, t), forward.add_noise(x0, eps, 1000 - t), atol=1e-6)
    np.testing.assert_array_equal(inverted.velocity(x0, eps, t), -forward.velocity(x0, eps, t))
    part = inverted.table(8, strength=0.5)
    np.testing.assert_allclose(part.levels, forward.table(8, strength=0.5).levels)


@pytest.mark.parametrize(
    "scheduler", [FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), FlowMatchLCMScheduler()]
)
def test_jumps_end_at_the_level_of_the_next_step(scheduler: Any, rng: np.random.Generator) -> None:
    x0, table = rng.standard_normal((1, 5)), scheduler.table(6)
    rows = iter(table.to_x0)

    def model(x: np.ndarray, t: float) -> np.ndarray:
        of_sample, of_output = next(rows)
        return (x0 - of_sample * x) / of_output

    noise = list(rng.standard_normal((6, 1, 5)))
    run = table.run(model, rng.standard_normal((1, 5)), noise)
    for i, (alpha, sigma) in enumerate(table.levels[1:]):
        np.testing.assert_allclose(run[i + 1], alpha * x0 + sigma * noise[i], atol=1e-12)


def test_the_two_parts_of_a_run() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    first, second = scheduler.table(10, denoising_end=0.4), scheduler.table(10, denoising_start=0.4)
    assert len(first) + len(second) == 10
    assert first.timesteps[-1] >= 600 > second.timesteps[0]


DYNAMIC = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DYNAMIC.table(4), r"use_dynamic_shifting=True and needs plan\(..., mu=\)"),
        (lambda: FlowMatchEulerDiscreteScheduler().table(4, mu=1.0), "got mu=1 but has use_dynamic_shifting=False"),
        (lambda: FlowMatchHeunDiscreteScheduler().table(4, mu=1.0), "has no option mu"),
        (lambda: FlowMatchHeunDiscreteScheduler(shift=-1.0).table(4), "shift must be a number from 0 to .*, got -1.0"),
        (lambda: DYNAMIC.table(timesteps=[900.0, 100.0], mu=1.0), "not shifted; leave mu out or give sigmas="),
        (lambda: DYNAMIC.table(timesteps=[1001.0]), "between 0 and 1000, got 1001"),
        (lambda: DYNAMIC.table(sigmas=[1.5, 0.5], mu=1.0), r"above 0 and up to 1, got 1\.5 \.\.\. 0\.5"),
        (lambda: DYNAMIC.table(sigmas=[1.0, 0.0], mu=1.0), r"above 0 and up to 1, got 1 \.\.\. 0"),
        (lambda: FlowMatchEulerDiscreteScheduler(time_shift_type="log"), "time_shift_type must be one of"),
        (lambda: FlowMatchEulerDiscreteScheduler(shift_terminal=1.0), "from 0 to below 1, got 1.0"),
        (lambda: FlowMatchEulerDiscreteScheduler(prediction_type="epsilon"), "prediction_type"),
        (lambda: FlowMatchEulerDiscreteScheduler(base_shift=None).mu(100), "no base_shift or max_shift"),
        (
            lambda: FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True, use_beta_sigmas=True),
            "only one of .* can be set",
        ),
        (
            lambda: FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True).table(timesteps=[900.0, 100.0]),
            "cannot take timesteps=",
        ),
        (
            lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True).table(4, denoising_end=0.5),
            "run as a whole, without denoising_end=",
        ),
        (
            lambda: FlowMatchLCMScheduler(scale_factors=[0.5, 1.0]).table(4),
            r"scale_factors=\[0.5, 1.0\] changes the size",
        ),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_scale_factors_are_kept() -> None:
    scheduler = FlowMatchLCMScheduler.from_config({"scale_factors": [0.5, 1.0]})
    assert scheduler.to_json()["scale_factors"] == [0.5, 1.0]
