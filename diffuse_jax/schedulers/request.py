"""Validates the steps that a caller requests: their number or an explicit list, and the part of them to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from diffuse_jax.bounds import flag, real, whole
from diffuse_jax.messages import brief
from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Table


class Limits(Protocol):
    """What a request is checked against: the properties of a scheduler that say which runs it can make."""

    @property
    def class_name(self) -> str: ...
    @property
    def num_train_timesteps(self) -> int: ...
    @property
    def explicit_range(self) -> tuple[float, float]: ...
    @property
    def ascends(self) -> bool: ...
    @property
    def limits_steps(self) -> bool: ...
    @property
    def final_sigma_given(self) -> bool: ...
    def settings(self) -> dict[str, Any]: ...
    @property
    def grid_options(self) -> tuple[str, ...]: ...
    @property
    def step_options(self) -> tuple[str, ...]: ...


MAX_STEPS = 100_000
"""The largest number of steps of samplers that may take more than the network was trained with."""

OPTIONS: dict[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys(("eta", "mu", "grid_strength", "s_churn", "s_tmin", "s_noise"), real),
    "s_tmax": lambda value, name: value if value == np.inf else real(value, name),
    **dict.fromkeys(("original_inference_steps", "order", "jump_length", "jump_n_sample"), whole),
    **dict.fromkeys(("as_published", "strided", "use_clipped_model_output"), flag),
}
"""Option of samplers -> what reads it as a Python number; an option that is something else is not here."""


def chosen_steps(
    scheduler: Limits, n: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
) -> tuple[int, Array | None, Array | None]:
    """The number of steps and, if given, the explicit timesteps or sigmas as arrays.

    A number may be given beside a list if it is the list's.

    Raises:
      ValueError: not exactly one of the three was given, or what was given is no run of this scheduler.
    """
    names = ("num_inference_steps", "timesteps", "sigmas")
    got = [name for name, value in zip(names, (n, timesteps, sigmas), strict=True) if value is not None]
    if n is not None and len(got) == 2:
        found = chosen_steps(scheduler, None, timesteps, sigmas)
        if found[0] == n:
            return found
        raise ValueError(
            f"give exactly one of {', '.join(names)}; num_inference_steps={n}, but {got[1]} give {found[0]}"
        )
    if len(got) != 1:
        raise ValueError(f"give exactly one of {', '.join(names)}; got {' and '.join(got) or 'none'}")
    if timesteps is not None:
        low, high = scheduler.explicit_range
        array = ns.check_ordered(timesteps, "timesteps", ascending=scheduler.ascends, lower=low, upper=high)
        return len(array), array, None
    if sigmas is not None:
        array = ns.check_ordered(sigmas, "sigmas", ascending=scheduler.ascends)
        if scheduler.final_sigma_given and len(array) < 2:
            raise ValueError(f"sigmas needs one entry per step and the final one, got {len(array)}")
        return len(array) - scheduler.final_sigma_given, None, array
    most = scheduler.num_train_timesteps if scheduler.limits_steps else MAX_STEPS
    if not 1 <= (n := whole(n, "num_inference_steps")) <= most:
        source = " (num_train_timesteps)" if scheduler.limits_steps else ""
        raise ValueError(f"num_inference_steps must be a whole number from 1 to {most}{source}, got {brief(n)}")
    return n, None, None


def split_options(scheduler: Limits, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that go to ``grid`` and those that go to ``evaluations``; those that are None have their defaults.

    Raises:
      ValueError: an option that the scheduler does not have, or of the wrong kind.
    """
    possible = [*dict.fromkeys((*scheduler.grid_options, *scheduler.step_options))]
    unknown = set(options) - {*possible}
    if unknown:
        options_there = ", ".join(possible) or "none"
        raise ValueError(
            f"{scheduler.class_name} has no option {', '.join(sorted(unknown))}; its options: {options_there}"
        )
    read = lambda name, value: OPTIONS[name](value, name) if name in OPTIONS else value
    given = {name: read(name, value) for name, value in options.items() if value is not None}
    grid = {name: given[name] for name in scheduler.grid_options if name in given}
    return grid, {name: given[name] for name in scheduler.step_options if name in given}


def check_share(share: Any, name: str) -> float:
    """A share of a run as a number between 0 and 1, or an error."""
    if not 0 < real(share, name) < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {share}")
    return real(share, name)


def check_strength(strength: float | None, name: str = "strength") -> None:
    """Refuse a strength outside (0, 1]."""
    if strength is not None and not 0 < real(strength, name) <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {strength}")


def check_whole(scheduler: Limits, start: float | None, end: float | None) -> None:
    """Refuse to share a run from an image to noise with another model."""
    if scheduler.ascends and (start, end) != (None, None):
        raise ValueError(
            f"{scheduler.class_name} runs from an image to noise and has no part to leave to another model; give"
            " strength= to stop early instead of denoising_start= or denoising_end="
        )


def check_one_way(scheduler: Limits, timesteps: Array) -> None:
    """Refuse to run a part of a run that goes back to more noise in between."""
    if not scheduler.ascends and np.any(np.diff(timesteps) > 0):
        raise ValueError(
            f"{scheduler.class_name} goes back to more noise between its steps and is run as a whole, without"
            " strength=, denoising_start= and denoising_end="
        )


def check_finite(scheduler: Limits, table: Table) -> None:
    """Refuse a run that would turn every sample into NaN, because a level has no signal or no noise to divide by."""
    with np.errstate(over="ignore"):
        used = (np.float32(array) for array in (table.to_x0, table.levels[:-1], table.rows, table.init_scale))
    if not all(np.isfinite(array).all() for array in used):
        raise ValueError(
            f"{scheduler.class_name}: this run has coefficients that are infinite or NaN, since its noise schedule "
            f"reaches a level without signal or without noise; its settings are {brief(scheduler.settings())}"
        )


def steps_to_run(n: int, strength: float) -> int:
    """How many of ``n`` steps ``strength`` leaves; an error if none."""
    run = min(int(n * strength), n)
    if run < 1:
        raise ValueError(
            f"strength={strength} of {n} steps leaves none to run; use a strength of at least {1 / n:g} or more steps"
        )
    return run
