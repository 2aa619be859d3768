"""Noise schedules in NumPy float64: betas, spacings of timesteps and sigmas, and what a network's output means.

A noisy sample is ``x = alpha * x0 + sigma * eps``. Three kinds of coordinates occur (:data:`COORDINATES`): with
``alpha^2 + sigma^2 = 1`` (preserving), in which most networks are trained; with ``alpha = 1`` (exploding), in which
many samplers are written; with ``alpha + sigma = 1`` (flow), the straight lines of flow matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuse_jax.messages import brief

Array = NDArray[np.float64]

COORDINATES = ("preserving", "exploding", "flow")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")

ALMOST_ZERO_SNR = 2.0**-24
"""What sigma-based samplers put for ``alpha_bar = 0``, so that the first sigma is 4096 and not infinite."""


def beta_table(schedule: str, start: float, end: float, steps: int) -> Array:
    """The betas ``[steps]`` of a named training schedule.

    ``linear`` (Ho et al. 2020), ``scaled_linear`` (latent diffusion: linear in the square root), ``squaredcos_cap_v2``
    (Nichol and Dhariwal 2021, eq. 17, betas capped at 0.999), ``sigmoid`` (GeoDiff), ``laplace`` (Hang et al. 2024,
    arXiv 2407.03297, table 1, betas capped likewise), ``exp`` (alpha_bar falls exponentially, capped likewise).
    """
    if schedule == "linear":
        return np.linspace(start, end, steps)
    if schedule == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    if schedule == "sigmoid":
        return (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps))) + start
    alpha_bar = _alpha_bar_at(schedule, np.arange(steps + 1) / steps)
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _alpha_bar_at(schedule: str, t: Array) -> Array:
    """Schedules that are given by alpha_bar as a function of time in [0, 1]."""
    if schedule == "squaredcos_cap_v2":
        return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    if schedule == "laplace":
        # Networks were trained with this root of the paper's alpha_bar.
        log_snr = -0.5 * np.where(t <= 0.5, 1, -1) * np.log(1 - 2 * np.abs(0.5 - t) + 1e-6)
        return np.sqrt(1 / (1 + np.exp(-log_snr)))
    if schedule == "exp":
        return np.exp(-12.0 * t)
    names = ("linear", "scaled_linear", "sigmoid", "squaredcos_cap_v2", "laplace", "exp")
    raise ValueError(f"beta_schedule must be one of {names}, got {schedule!r}")


def rescale_zero_terminal_snr(alpha_bar: Array) -> Array:
    """Shift and scale ``sqrt(alpha_bar)`` to end at 0 from the same start (Lin et al. 2023, alg. 1)."""
    root = np.sqrt(alpha_bar)
    return np.square((root - root[-1]) * root[0] / (root[0] - root[-1]))


@lru_cache(maxsize=64)
def alpha_bar_table(
    schedule: str, start: float, end: float, steps: int, trained: tuple[float, ...] | None, zero_snr: bool
) -> Array:
    """The cumulative product of ``1 - beta``, ``[steps]``, read-only; shared by all schedulers with these settings.

    Args:
      schedule, start, end, steps: as for :func:`beta_table`.
      trained: the betas outright, instead of the named schedule.
      zero_snr: rescale to zero terminal SNR.

    Raises:
      ValueError: a beta outside 0 to 1.
    """
    betas = beta_table(schedule, start, end, steps) if trained is None else np.asarray(trained, np.float64)
    if not np.all((betas >= 0) & (betas <= 1)):
        given = f"beta_start={start} and beta_end={end}" if trained is None else "trained_betas"
        low, high = betas.min(), betas.max()
        raise ValueError(f"betas must lie between 0 and 1; those of {given} run from {low:g} to {high:g}")
    alpha_bar = np.asarray(np.cumprod(1 - betas), np.float64)
    alpha_bar = rescale_zero_terminal_snr(alpha_bar) if zero_snr else alpha_bar
    alpha_bar.setflags(write=False)
    return alpha_bar


def preserving_levels(alpha_bar: Array) -> Array:
    """(alpha, sigma) with ``alpha^2 + sigma^2 = 1``, ``[n, 2]``."""
    return np.stack([np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)], -1)


def exploding_sigmas(alpha_bar: Array) -> Array:
    """``sqrt((1 - alpha_bar) / alpha_bar)``; a last ``alpha_bar`` of zero is replaced, so that all are finite."""
    if alpha_bar[-1] == 0:
        # In long schedules the timestep before may have even less signal; then half of that.
        almost = ALMOST_ZERO_SNR if alpha_bar[-2] > ALMOST_ZERO_SNR else alpha_bar[-2] / 4
        alpha_bar = np.append(alpha_bar[:-1], almost)
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def predict_x0(prediction_type: str, x: Any, output: Any, alpha: Any, sigma: Any, sigma_data: float = 1.0) -> Any:
    """The clean sample that an output means, for ``x = alpha * x0 + sigma * eps`` in any coordinates.

    Linear in ``x`` and ``output``, which may be arrays of any library or rows of coefficients.

    * ``epsilon`` is the noise, ``negative_epsilon`` the same with the other sign, ``sample`` the clean sample.
    * ``v_prediction`` is ``v = a * eps - s * x0 / sigma_data`` with ``(a, s) = (alpha * sigma_data, sigma)`` divided by
      their norm (Salimans and Ho 2022, appendix D; ``sigma_data``, the spread of clean samples, is 1 there).
    * ``edm`` is the same with the other sign, the network F of Karras et al. 2022, table 1.
    * ``score`` is the gradient of the log density of the noisy samples, ``-eps / sigma`` (Song et al. 2021).
    * ``flow_prediction`` is the velocity ``eps - x0`` of the straight line that ``x / (alpha + sigma)`` lies on (Lipman
      et al. 2023; Liu et al. 2023), ``negative_flow`` the same with the other sign.
    """
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha
    if prediction_type == "negative_epsilon":
        return (x + sigma * output) / alpha
    if prediction_type == "sample":
        return output
    if prediction_type == "score":
        return (x + sigma**2 * output) / alpha
    if prediction_type in ("flow_prediction", "negative_flow"):
        return (x - (sigma if prediction_type == "flow_prediction" else -sigma) * output) / (alpha + sigma)
    sign = {"v_prediction": -1.0, "edm": 1.0}[prediction_type]
    norm2 = (alpha * sigma_data) ** 2 + sigma**2
    return (alpha * sigma_data**2 / norm2) * x + (sign * sigma * sigma_data / norm2**0.5) * output


def predict_eps(prediction_type: str, x: Any, output: Any, alpha: Any, sigma: Any, sigma_data: float = 1.0) -> Any:
    """The noise that an output means; see :func:`predict_x0`."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "negative_epsilon":
        return -output
    if prediction_type == "sample":
        return (x - alpha * output) / sigma
    if prediction_type == "score":
        return -sigma * output
    if prediction_type in ("flow_prediction", "negative_flow"):
        return (x + (alpha if prediction_type == "flow_prediction" else -alpha) * output) / (alpha + sigma)
    sign = {"v_prediction": 1.0, "edm": -1.0}[prediction_type]
    norm2 = (alpha * sigma_data) ** 2 + sigma**2
    return (sigma / norm2) * x + (sign * alpha * sigma_data / norm2**0.5) * output


def space_timesteps(spacing: str, train_steps: int, n: int, offset: int, *, rounded: bool = True) -> Array:
    """``n`` descending timesteps (Lin et al. 2023, table 2); ``rounded=False`` keeps the fractions of linspace."""
    if spacing == "linspace":
        t = np.linspace(0, train_steps - 1, n)[::-1]
        return np.round(t) if rounded else t.copy()
    if spacing == "leading":
        return (np.arange(n)[::-1] * (train_steps // n) + offset).astype(np.float64)
    return np.round(train_steps - np.arange(n) * (train_steps / n)) - 1


def sigma_to_timestep(sigma: Array, table: Array) -> Array:
    """Where each sigma lies in the ascending training ``table``: linear in the logarithm, clamped to its ends."""
    return np.interp(np.log(np.maximum(sigma, 1e-10)), np.log(table), np.arange(len(table)))


def karras_sigmas(sigma_min: float, sigma_max: float, n: int, rho: float = 7.0) -> Array:
    """Karras et al. 2022, eq. 5."""
    return karras_ramp(np.linspace(0, 1, n), sigma_min, sigma_max, rho)


def karras_ramp(ramp: Array, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Array:
    """The same at places ``ramp`` between 0 (``sigma_max``) and 1 (``sigma_min``)."""
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def training_ramp(timesteps: Array, train_steps: int) -> Array:
    """Ascending places between 0 and 1 of descending places in a list of ``train_steps`` levels."""
    return timesteps[::-1] / max(train_steps - 1, 1)


def exponential_sigmas(sigma_min: float, sigma_max: float, n: int) -> Array:
    """Evenly spaced in the logarithm."""
    return np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), n))


def beta_sigmas(sigma_min: float, sigma_max: float, n: int, alpha: float = 0.6, beta: float = 0.6) -> Array:
    """Quantiles of a beta distribution (Lee et al. 2024, 'Beta Sampling is All You Need')."""
    from scipy.special import betaincinv

    return sigma_min + betaincinv(alpha, beta, np.linspace(1, 0, n)) * (sigma_max - sigma_min)


def check_ordered(
    values: Sequence[float], name: str, *, ascending: bool = False, lower: float = 0.0, upper: float = 1e9
) -> Array:
    """``values`` as an array, or an error naming the first entry that is not smaller than the one before it.

    With ``ascending``, not larger. No entry may be smaller than ``lower`` or larger than ``upper``.
    """
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a list of numbers, got {brief(values)}") from None
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a non-empty flat list of numbers, got shape {array.shape}")
    bad = np.flatnonzero(~(np.diff(array) > 0 if ascending else np.diff(array) < 0))
    if bad.size:
        i, order = int(bad[0]), "ascend" if ascending else "descend"
        raise ValueError(f"{name} must {order}, but entry {i + 1} is {array[i + 1]:g} after {array[i]:g}")
    if not (array.min() >= lower and array.max() <= upper):
        raise ValueError(f"{name} must lie between {lower:g} and {upper:g}, got {array[0]:g} ... {array[-1]:g}")
    return array
