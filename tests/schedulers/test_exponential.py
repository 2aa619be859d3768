"""Exponential integrators on flow matching: levels, exact answers, what contradicts; spacings of sigmas."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from diffuse_jax import schedulers
from diffuse_jax.schedulers import (
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    SASolverScheduler,
    Scheduler,
    UniPCMultistepScheduler,
)

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FAMILY = [
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
]
EVERY = pytest.mark.parametrize("name", FAMILY)


def build(name: str, **config: Any) -> Scheduler:
    return getattr(schedulers, name)(**config)


@EVERY
@pytest.mark.parametrize("n", [1, 7, 50, 1000])
def test_a_straight_line_is_followed(name: str, n: int) -> None:
    """A network that predicts the same flow everywhere: samples stay on the line that it means."""
    options: dict[str, Any] = {"tau": 0.0} if name == "SASolverScheduler" else {}
    if name in ("DEISMultistepScheduler", "SASolverScheduler"):
        options["as_published"] = True  # otherwise the last step stays where it is
    table = build(name, **FLOW, flow_shift=3.0).table(n, **options)
    x0, eps = np.random.default_rng(0).standard_normal((2, 1, 5))
    alpha, sigma = table.levels[0]
    np.testing.assert_allclose(table.levels.sum(1), 1, atol=1e-15)
    np.testing.assert_array_equal(table.input_scale, 1)
    assert table.init_scale == 1
    ends = table.run(lambda *_: eps - x0, alpha * x0 + sigma * eps)
    for (alpha, sigma), x in zip(table.levels[:-1], ends[:-1], strict=True):
        np.testing.assert_allclose(x, alpha * x0 + sigma * eps, atol=1e-9)
    np.testing.assert_allclose(ends[-1], x0 if not table.levels[-1, 1] else ends[-1], atol=0.01)


@EVERY
def test_the_network_gets_its_noise_level(name: str) -> None:
    table = build(name, **FLOW, flow_shift=2.0).table(20)
    np.testing.assert_array_equal(table.timesteps, np.trunc(1000 * table.levels[:-1, 1]))
    up = build(name).ascends
    assert np.all(np.diff(table.levels[:, 1]) > 0 if up else np.diff(table.levels[:, 1]) < 0)


@EVERY
def test_explicit_levels_are_shifted(name: str) -> None:
    """One per step, as flow-matching samplers take them; a single one may be pure noise."""
    scheduler = build(name, **FLOW, flow_shift=3.0)
    given = np.array([1.0, 0.7, 0.2])
    levels = scheduler.table(sigmas=given[::-1] if scheduler.ascends else given).levels[:, 1]
    levels = levels[::-1] if scheduler.ascends else levels
    shifted = 3 * given / (1 + 2 * given)
    np.testing.assert_allclose(levels[:3], np.minimum(shifted, 1 - 1e-6))
    assert len(scheduler.table(sigmas=[1.0])) == 1


@EVERY
def test_noising_and_the_training_target(name: str) -> None:
    scheduler = build(name, **FLOW)
    x0, eps = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    noisy = scheduler.add_noise(x0, eps, np.array([0, 300, 999]))
    np.testing.assert_allclose(noisy[1], 0.7 * x0[1] + 0.3 * eps[1], atol=1e-6)
    np.testing.assert_allclose(scheduler.velocity(x0, eps, np.array([0, 300, 999])), eps - x0, atol=1e-6)


def test_inversion_and_sampling_return_to_the_start_on_a_flow() -> None:
    """Inversion goes along the levels of sampling that does not end clean, in the other order."""
    config = FLOW | {"flow_shift": 2.0}
    back = DPMSolverMultistepInverseScheduler(**config).table(100)
    forward = DPMSolverMultistepScheduler(**config, final_sigmas_type="sigma_min").table(100)
    np.testing.assert_allclose(back.levels[1:], forward.levels[:-1][::-1])
    model = lambda x, t: np.tanh(x) - 0.3 * x
    image = np.random.default_rng(0).standard_normal((1, 20))
    noise = back.run(model, image)[-1]
    np.testing.assert_allclose(forward.run(model, noise)[-1], image, atol=2e-3)


def test_karras_levels_of_a_flow() -> None:
    config = FLOW | {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0}
    sigma = UniPCMultistepScheduler(**config).table(10).levels[:-1, 1]
    assert sigma[0] == pytest.approx(200 / 201)
    assert sigma[-1] == pytest.approx(0.01 / 1.01)


def test_terminal_level() -> None:
    scheduler = UniPCMultistepScheduler(**FLOW, flow_shift=2.0, shift_terminal=0.1)
    assert scheduler.table(10).levels[-2, 1] == pytest.approx(0.1)
    assert np.isfinite(scheduler.table(1).rows).all()


def test_dynamic_shift_is_a_fixed_one_for_each_size() -> None:
    dynamic = UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True)
    fixed = UniPCMultistepScheduler(**FLOW, flow_shift=float(np.exp(0.8)))
    np.testing.assert_allclose(dynamic.table(9, mu=0.8).rows, fixed.table(9).rows, atol=1e-12)


def test_flow_is_a_property_of_one_scheduler() -> None:
    scheduler = DPMSolverMultistepScheduler(**FLOW)
    assert (scheduler.coordinates, DPMSolverMultistepScheduler().coordinates) == ("flow", "preserving")
    assert pickle.loads(pickle.dumps(scheduler)).coordinates == "flow"
    back = scheduler.replace(use_flow_sigmas=False, prediction_type="epsilon")
    assert back == DPMSolverMultistepScheduler()
    assert back.coordinates == "preserving"
    assert DEISMultistepScheduler.from_config(scheduler).coordinates == "flow"


@EVERY
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_flow_sigmas": True}, "got prediction_type='epsilon'; set prediction_type='flow_prediction'"),
        ({"prediction_type": "flow_prediction"}, "needs use_flow_sigmas=True"),
        (FLOW | {"use_beta_sigmas": True}, "use_flow_sigmas and use_beta_sigmas both choose the noise levels"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of .*'use_karras_sigmas', 'use_beta_sigmas'"),
    ],
)
def test_contradictions(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DEISMultistepScheduler(**FLOW, use_karras_sigmas=True), "both choose the noise levels"),
        (lambda: UniPCMultistepScheduler(use_dynamic_shifting=True), "is for flow levels; set use_flow_sigmas=True"),
        (lambda: UniPCMultistepScheduler(shift_terminal=0.1), "shift_terminal=0.1 is for flow levels"),
        (
            lambda: UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True, shift_terminal=0.1),
            "shift_terminal=0.1 has no use with use_karras_sigmas=True",
        ),
        (
            lambda: UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True, flow_shift=3.0),
            "flow_shift=3 has no use with use_karras_sigmas",
        ),
        (lambda: UniPCMultistepScheduler(**FLOW, time_shift_type="cubic"), "time_shift_type must be one of"),
        (lambda: UniPCMultistepScheduler(**FLOW).table(timesteps=[5, 1]), "give sigmas= instead of timesteps="),
        (lambda: UniPCMultistepScheduler(**FLOW).table(sigmas=[2.0, 1.0]), r"above 0 and up to 1, .* got 2 \.\.\. 1"),
        (lambda: UniPCMultistepScheduler(**FLOW).table(sigmas=[1.0, 0.0]), r"above 0 and up to 1, .* got 1 \.\.\. 0"),
        (
            lambda: UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True).table(sigmas=[1.0, 0.5]),
            "cannot take sigmas=",
        ),
        (lambda: UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True).table(5), r"needs plan\(\.\.\., mu=\)"),
        (lambda: UniPCMultistepScheduler(**FLOW).table(5, mu=0.8), "got mu=0.8 but has use_dynamic_shifting=False"),
        (lambda: UniPCMultistepScheduler().table(5, mu=0.8), "got mu=0.8 but has use_dynamic_shifting=False"),
        (lambda: SASolverScheduler(**FLOW).table(5, mu=0.8), "SASolverScheduler has no option mu"),
        (lambda: UniPCMultistepScheduler(**FLOW, flow_shift=0.0), "flow_shift must be a number from 1e-09"),
    ],
)
def test_impossible_values_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [None, "learned", "learned_range"])
def test_a_variance_from_the_network_is_ignored(kind: str | None) -> None:
    """The first half of the channels is what counts; nothing of the second half reaches the sample."""
    plan = DPMSolverMultistepScheduler(variance_type=kind).plan(5)
    x, out, variance = np.random.default_rng(0).standard_normal((3, 1, 2, 2, 3)).astype(np.float32)
    state = plan.init(x)
    noise = np.zeros_like(x)
    plain = plan.step(state, 0, out, noise=noise).sample
    doubled = plan.step(state, 0, np.concatenate([out, variance], -1), noise=noise).sample
    np.testing.assert_array_equal(plain, doubled)
