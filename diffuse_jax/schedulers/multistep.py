"""Formulas that the exponential integrators (DPM-Solver, DEIS, UniPC, SA-Solver) share.

All solve the diffusion equation exactly but for the network's output, in ``lambda = log(alpha / sigma)``. A step of
length ``h`` in lambda is ``x' = p * x - q * (expm1(u) * m0 + ...)``, where the output ``m0`` is the clean sample and
``(p, q, u) = (sigma'/sigma, alpha', -h)``, or the noise and ``(p, q, u) = (alpha'/alpha, sigma', h)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial
from typing import NamedTuple

import numpy as np

from diffuse_jax.schedulers.noise_schedule import Array

FEW_STEPS = 15
"""Runs shorter than this end with steps of lower order (``lower_order_final``)."""


class Step(NamedTuple):
    """Coefficients of one exponential-integrator step; see the module."""

    p: float
    q: float
    u: float


def log_snr_half(level: Array) -> float:
    """``lambda = log(alpha / sigma)`` of an (alpha, sigma) pair; infinite for a clean sample."""
    return float(np.inf if level[1] == 0 else np.log(level[0] / level[1]))


def exponential_step(source: Array, target: Array, *, data: bool) -> Step:
    """The step between two levels, for a network output read as clean data or as noise."""
    if source[1] == 0 or (target[1] == 0 and not data):
        way = "from" if source[1] == 0 else "to"
        raise ValueError(
            f"this sampler cannot step {way} sigma 0, where lambda = log(alpha / sigma) is infinite"
            f"{'' if data else ' (it extrapolates noise)'}; give sigmas that are above 0"
        )
    h = log_snr_half(target) - log_snr_half(source)
    if data:
        return Step(target[1] / source[1], target[0], -h)
    return Step(target[0] / source[0], target[1], h)


def adams_weights(nodes: Sequence[float], h: float, rate: float = 1.0) -> Array:
    """Weights ``W`` for which ``sum(W * f(nodes))`` is the integral of ``f(w) exp(-rate * w)`` over [0, h].

    Exact for polynomials of a degree below the number of nodes.
    """
    from scipy.special import gammainc

    k = np.arange(len(nodes))
    moments = [factorial(i) / rate ** (i + 1) * gammainc(i + 1, rate * h) / h**i for i in k]
    if len(nodes) == 1:
        return np.array(moments)
    return np.linalg.solve(np.vander(np.asarray(nodes) / h, increasing=True).T, moments)
