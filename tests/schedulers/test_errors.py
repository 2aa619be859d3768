"""What every sampler refuses: each message says what was given and what is possible."""

from __future__ import annotations

import re
from typing import Any

import pytest

from diffuse_jax import schedulers
from diffuse_jax.schedulers.request import OPTIONS
from tests.schedulers.samplers import NAMES, ascends, has

EVERY = pytest.mark.parametrize("name", NAMES)


def refusal(name: str, **request: Any) -> str:
    """The message with which a plan is refused."""
    with pytest.raises(ValueError) as error:
        getattr(schedulers, name)().table(**request)
    return str(error.value)


@EVERY
def test_unknown_options(name: str) -> None:
    message = refusal(name, num_inference_steps=5, banana=1)
    assert f"{name} has no option banana; its options: " in message
    for option in (*getattr(schedulers, name).grid_options, *getattr(schedulers, name).step_options):
        assert option in message


@EVERY
def test_unknown_settings(name: str) -> None:
    cls = getattr(schedulers, name)
    own = ", ".join(key for key in cls().to_json() if key != "_class_name")
    with pytest.raises(ValueError, match=f"{name} has no setting banana; it has "):
        cls.from_config({}, banana=1)
    with pytest.raises(ValueError, match=own):
        cls.from_config({}, banana=1)


@pytest.mark.parametrize("name", [name for name in NAMES if has(name, "prediction_type")])
def test_settings_out_of_range(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: prediction_type must be one of \['.*'\], got 'banana'"):
        getattr(schedulers, name)(prediction_type="banana")


@EVERY
@pytest.mark.parametrize("n", [0, -3, 2.5, True, "ten"])
def test_numbers_of_steps(name: str, n: Any) -> None:
    assert refusal(name, num_inference_steps=n).endswith(f"got {n!r}")


@pytest.mark.parametrize("name", [name for name in NAMES if getattr(schedulers, name).limits_steps])
def test_more_steps_than_training_steps(name: str) -> None:
    most = getattr(schedulers, name)().num_train_timesteps
    message = refusal(name, num_inference_steps=most + 1)
    assert f"from 1 to {most} (num_train_timesteps), got {most + 1}" in message


@EVERY
def test_steps_are_given_in_one_way_only(name: str) -> None:
    assert "give exactly one of num_inference_steps, timesteps, sigmas; got none" in refusal(name)
    low, high = sorted(getattr(schedulers, name)().explicit_range)
    pair = [low, high] if ascends(name) else [high, low]
    message = refusal(name, num_inference_steps=5, timesteps=pair)
    assert "exactly one of" in message and re.search(r"num_inference_steps=5, but timesteps give [12]$", message)
    assert "got timesteps and sigmas" in refusal(name, timesteps=[3, 1], sigmas=[3.0, 1.0])


@EVERY
def test_the_order_of_explicit_timesteps(name: str) -> None:
    way, wrong, right = ("ascend", (0.9, 0.1), "0.1 after 0.9") if ascends(name) else ("descend", (0.1, 0.9), "")
    low, high = getattr(schedulers, name)().timestep_range
    first, second = (low + share * (high - low) for share in wrong)
    for kind, pair in {"timesteps": (first, second), "sigmas": wrong, "same": (first, first)}.items():
        kind = "timesteps" if kind == "same" else kind
        message = refusal(name, **{kind: list(pair)})
        assert f"{kind} must {way}, but entry 1 is {pair[1]:g} after {pair[0]:g}" in message


@EVERY
def test_explicit_timesteps_are_those_of_the_network(name: str) -> None:
    low, high = getattr(schedulers, name)().explicit_range
    assert f"timesteps must lie between {low:g} and {high:g}, got {high + 1:g}" in refusal(name, timesteps=[high + 1])
    assert "non-empty flat list" in refusal(name, timesteps=[])
    assert "sigmas must lie between 0 and 1e+09" in refusal(name, sigmas=[-1.0])


@EVERY
@pytest.mark.parametrize("strength", [0.0, -1.0, 1.1])
def test_strength_is_a_share(name: str, strength: float) -> None:
    assert f"strength must lie in (0, 1], got {strength}" in refusal(name, num_inference_steps=5, strength=strength)


@EVERY
def test_strength_that_leaves_no_step(name: str) -> None:
    message = refusal(name, num_inference_steps=5, strength=0.01)
    assert "strength=0.01" in message
    assert "use a strength" in message


@EVERY
def test_strength_and_denoising_start_exclude_each_other(name: str) -> None:
    message = refusal(name, num_inference_steps=5, strength=0.5, denoising_start=0.5)
    assert "strength" in message and "denoising_start" in message
    for share in (0.0, 1.0, 1.5):
        message = refusal(name, num_inference_steps=5, denoising_end=share)
        assert "denoising_end" in message
        assert ascends(name) or f"strictly between 0 and 1, got {share}" in message


@EVERY
def test_options_that_are_no_numbers(name: str) -> None:
    """Every option of every sampler is read as the number that it is, or is listed here as something else."""
    cls = getattr(schedulers, name)
    for option in {*cls.grid_options, *cls.step_options} - {"tau", "solver_p"}:
        assert option in OPTIONS
        message = refusal(name, num_inference_steps=5, **{option: "x"})
        assert re.search(f"{option} must be (an integer|a finite number|True or False).*, got 'x'", message)


@EVERY
@pytest.mark.parametrize("wrong", [1.5, "x", True, [5]])
def test_numbers_of_steps_are_integers(name: str, wrong: Any) -> None:
    assert "num_inference_steps must be an integer" in refusal(name, num_inference_steps=wrong)


def test_a_share_is_a_number() -> None:
    assert "denoising_end must be a finite number, got 'x'" in refusal(
        "DDIMScheduler", num_inference_steps=5, denoising_end="x"
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDIMScheduler", {"beta_start": 0.5}),  # no signal is left in float32
        ("EulerDiscreteScheduler", {"beta_end": 0.5}),
        ("DDIMScheduler", {"beta_start": 0.0}),  # no noise to divide by
        ("ScoreSdeVpScheduler", {"sampling_eps": 0.0}),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_noise_schedules_that_end_in_nan(name: str, settings: dict[str, float]) -> None:
    (setting,) = settings
    with pytest.raises(ValueError, match=rf"{name}: this run has coefficients that are infinite .*{setting}"):
        getattr(schedulers, name)(**settings).table(3)
