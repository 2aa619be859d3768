"""Order of convergence of every deterministic sampler, on a problem whose exact solution is known.

    python -m benchmarks.sampler_order

The data are a one-dimensional mixture of Gaussians and the network is its exact score. The probability-flow ODE in one
dimension preserves quantiles (Song et al. 2021, section 4.3: it has the marginals of the diffusion, and its paths
cannot cross), so a path that starts at the quantile q of the noisy marginal must be at the quantile q of every later
one. The error of a run is the largest distance from that at the last evaluation, where both marginals are known in
closed form; the order is the slope of the error against the number of steps, both on logarithmic scales.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax import schedulers
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.schedulers.table import Table

WEIGHTS, MEANS, SPREADS = np.array([0.5, 0.3, 0.2]), np.array([-1.0, 0.4, 1.3]), np.array([0.4, 0.3, 0.5])
QUANTILES = np.linspace(0.05, 0.95, 19)
STEPS = (20, 25, 40, 50, 100)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclasses.dataclass(frozen=True)
class Method:
    """A deterministic sampler: its class, the settings that show its order, and its theoretical order."""

    scheduler: str
    label: str
    order: int
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self) -> Scheduler:
        cls = getattr(schedulers, self.scheduler)
        wanted = SD | {"clip_sample": False}
        return cls(**{k: v for k, v in wanted.items() if k in cls().to_json()} | self.config)


KARRAS = {"use_karras_sigmas": True}
METHODS = [
    Method("DDIMScheduler", "", 1),
    Method("EulerDiscreteScheduler", "Karras", 1, KARRAS),
    Method("HeunDiscreteScheduler", "Karras", 2, KARRAS),
    Method("KDPM2DiscreteScheduler", "Karras", 2, KARRAS),
    *(Method("LMSDiscreteScheduler", f"order {k}, Karras", k, KARRAS, {"order": k}) for k in (1, 2, 3, 4)),
    Method("IPNDMScheduler", "as published", 2, plan={"as_published": True}),
    Method("PNDMScheduler", "Runge-Kutta start", 2),
    Method("PNDMScheduler", "skip_prk_steps", 2, {"skip_prk_steps": True}),
    # The published third-order formula gives the second derivative half its weight, which reduces it to order 2.
    *(
        Method("DPMSolverMultistepScheduler", f"order {k}, Karras", min(k, 2), KARRAS | {"solver_order": k})
        for k in (1, 2, 3)
    ),
    *(Method("DPMSolverSinglestepScheduler", f"order {k}, Karras", k, KARRAS | {"solver_order": k}) for k in (1, 2, 3)),
    *(Method("DEISMultistepScheduler", f"order {k}, Karras", k, KARRAS | {"solver_order": k}) for k in (1, 2, 3)),
    *(Method("UniPCMultistepScheduler", f"order {k}, Karras", k + 1, KARRAS | {"solver_order": k}) for k in (1, 2, 3)),
    *(
        Method(
            "SASolverScheduler",
            f"orders {k} and {k}, no noise, Karras",
            k,
            KARRAS | {"predictor_order": k, "corrector_order": k},
            {"tau": 0.0},
        )
        for k in (1, 2, 3)
    ),
    Method("EDMEulerScheduler", "", 1),
    *(Method("EDMDPMSolverMultistepScheduler", f"order {k}", min(k, 2), {"solver_order": k}) for k in (1, 2, 3)),
    Method("KarrasVeScheduler", "no churn", 2, {"s_churn": 0.0}),
    Method("FlowMatchEulerDiscreteScheduler", "", 1),
    Method("FlowMatchHeunDiscreteScheduler", "", 2),
]


def components(level: Array) -> tuple[Array, Array]:
    """Means and standard deviations of the mixture's components at an (alpha, sigma)."""
    return level[0] * MEANS, np.hypot(level[0] * SPREADS, level[1])


def cdf(x: Array, level: Array) -> Array:
    """Cumulative distribution function of the noisy marginal at ``x [n]``."""
    from scipy.special import ndtr

    means, spreads = components(level)
    return ndtr((x[:, None] - means) / spreads) @ WEIGHTS


def quantile(q: Array, level: Array) -> Array:
    """The inverse of :func:`cdf`, by bisection to the last bit."""
    means, spreads = components(level)
    low, high = np.full_like(q, (means - 9 * spreads).min()), np.full_like(q, (means + 9 * spreads).max())
    for _ in range(200):
        middle = (low + high) / 2
        below = cdf(middle, level) < q
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def exact_x0(x: Array, level: Array) -> Array:
    """Posterior mean of the clean sample, ``E[x0 | x]``."""
    means, spreads = components(level)
    z = (x[..., None] - means) / spreads
    likelihood = WEIGHTS / spreads * np.exp(-0.5 * z**2)
    posterior = likelihood / likelihood.sum(-1, keepdims=True)
    shrink = level[0] * SPREADS**2 / spreads**2
    return (posterior * (MEANS + shrink * (x[..., None] - means))).sum(-1)


def solve(table: Table, start: Array, noise: Sequence[Array] | None = None) -> list[Array]:
    """The samples of a run with the exact network, whatever its prediction type."""
    evaluation = iter(range(len(table)))

    def network(scaled: Array, timestep: float) -> Array:
        i = next(evaluation)
        x = scaled / table.input_scale[i]
        a, b = table.to_x0[i]
        return (exact_x0(x, table.levels[i]) - a * x) / b

    return table.run(network, start, noise)


def error(scheduler: Scheduler, n: int, **plan: Any) -> float:
    """The largest distance from the exact path at the last evaluation of ``n`` steps."""
    table = scheduler.table(n, **plan)
    path = solve(table, quantile(QUANTILES, table.levels[0]))
    at = table.levels[len(table) - 1]
    # In units of the data, since samplers use different coordinates.
    return float(np.abs(path[-2] - quantile(QUANTILES, at)).max() / np.hypot(*at))


def measure(method: Method) -> dict[str, Any]:
    """Errors at each of ``STEPS`` and the slope through them."""
    errors = [error(method.build(), n, **method.plan) for n in STEPS]
    slope = -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]
    return {
        "sampler": method.scheduler.removesuffix("Scheduler"),
        "settings": method.label,
        "order": method.order,
        "measured_order": round(float(slope), 2),
        **{f"error at {n}": float(f"{e:.2g}") for n, e in zip(STEPS, errors, strict=True)},
    }


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from common import write

    rows = [measure(method) for method in METHODS]
    for row in rows:
        print(row)
    about = (
        "Largest distance from the exact path of the probability-flow ODE (a mixture of three Gaussians, exact score) "
        "at the last evaluation, by number of steps, and its slope on logarithmic scales. `order` is that in theory."
    )
    print(write("sampler_order", "Order of convergence", about, rows, "numpy"))


if __name__ == "__main__":
    main()
