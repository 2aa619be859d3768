"""The grid of samplers defined on noise levels ``sigma / alpha``, which may lie between training timesteps."""

from __future__ import annotations

import numpy as np

from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers.noise_schedule import Array

SPACINGS = {
    "use_karras_sigmas": ns.karras_sigmas,
    "use_exponential_sigmas": ns.exponential_sigmas,
    "use_beta_sigmas": ns.beta_sigmas,
    "use_lu_lambdas": ns.exponential_sigmas,
}
"""Configuration flag -> function (sigma_min, sigma_max, n) -> sigmas."""

FINAL_SIGMAS = ("zero", "sigma_min")


def sigma_spacing(scheduler: object) -> str | None:
    """The one ``use_..._sigmas`` flag that is set, or None; two at once are an error."""
    chosen = [name for name in SPACINGS if getattr(scheduler, name, False)]
    if len(chosen) > 1:
        raise ValueError(f"{type(scheduler).__name__}: only one of {', '.join(SPACINGS)} can be set, got {chosen}")
    return chosen[0] if chosen else None


def check_no_spacing(scheduler: object, name: str) -> None:
    """Explicit timesteps or sigmas and a spacing of sigmas exclude each other."""
    spacing = sigma_spacing(scheduler)
    if spacing:
        raise ValueError(
            f"{type(scheduler).__name__} has {spacing}=True, which chooses the noise levels itself; it cannot take"
            f" {name}= (use .replace({spacing}=False))"
        )


def respaced(scheduler: object, sigma_min: float, sigma_max: float, n: int) -> Array:
    """``n`` sigmas spaced as the configuration says; its ``sigma_min`` and ``sigma_max`` override the arguments."""
    low, high = getattr(scheduler, "sigma_min", None), getattr(scheduler, "sigma_max", None)
    spacing = SPACINGS[sigma_spacing(scheduler) or ""]
    return spacing(sigma_min if low is None else low, sigma_max if high is None else high, n)


def at_timesteps(table: Array, timesteps: Array) -> Array:
    """Sigmas at (fractional) training timesteps, linear in between."""
    return np.interp(timesteps, np.arange(len(table)), table)


def path_interval(sigma: float, target: float) -> tuple[float, float]:
    """The piece of the one Brownian path of a run that a step from ``sigma`` down to ``target`` uses.

    Time on the path is ``1 / (1 + sqrt(sigma))``: it depends on neither the number of steps nor the schedule, so runs
    of more steps follow the same path, and it resolves all levels that samplers use.
    """
    return 1 / (1 + sigma**0.5), 1 / (1 + target**0.5)


def with_alpha(sigmas: Array, coordinates: str) -> Array:
    """(alpha, sigma) pairs in one of ``ns.COORDINATES``, of noise levels ``sigma / alpha`` (in "flow" of sigma)."""
    if coordinates == "flow":
        return np.stack([1 - sigmas, sigmas], -1)
    alpha = np.ones_like(sigmas) if coordinates == "exploding" else 1 / np.sqrt(1 + sigmas**2)
    return np.stack([alpha, alpha * sigmas], -1)
