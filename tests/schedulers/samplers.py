"""What the tests that go through every sampler need to know about each of them."""

from __future__ import annotations

import functools
from typing import Any

from diffuse_jax import schedulers
from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers.configuration import COMMON_CHOICES

EVERY = [name for name in schedulers.__all__ if name.endswith("Scheduler") and name != "Scheduler"]
"""Every sampler."""

NAMES = [name for name in EVERY if name not in ("ConsistencyDecoderScheduler", "VQDiffusionScheduler")]
"""Those whose runs are tables of any number of steps."""

REQUIRED: dict[str, dict[str, Any]] = {"VQDiffusionScheduler": {"num_vec_classes": 9}}
"""Settings without a default."""


def has(name: str, setting: str) -> bool:
    """Whether the class has this setting."""
    return setting in make(name).to_json()


def takes(name: str, setting: str, value: Any) -> bool:
    """Whether the class has this setting and allows this value."""
    return has(name, setting) and value in (COMMON_CHOICES | getattr(schedulers, name).choices).get(setting, [value])


def make(name: str, **config: Any) -> schedulers.Scheduler:
    """The scheduler with those of the settings that its class has and allows."""
    return getattr(schedulers, name)(**REQUIRED.get(name, {}), **{k: v for k, v in config.items() if takes(name, k, v)})


def ascends(name: str) -> bool:
    """Whether it runs from an image to noise."""
    return getattr(schedulers, name).ascends


@functools.cache
def stochastic(name: str) -> bool:
    """Whether a run without options draws noise."""
    return bool((make(name).table(20).rows[:, 0, -1] != 0).any())


def prediction_types(name: str) -> tuple[str, ...]:
    """Those that the class takes, and after which a sampler ends at what the network predicted."""
    if name == "KarrasEDMScheduler":
        return ("sample",)  # what the others mean is preconditioned once more
    return getattr(schedulers, name).choices.get("prediction_type", ns.PREDICTION_TYPES)


ONE_WAY = [name for name in NAMES if name not in ("RePaintScheduler", "KarrasVeScheduler")]
"""Samplers that never go back to more noise (inverse ones: to less)."""

LATE = [name for name in NAMES if not (ascends(name) or name == "RePaintScheduler")]
"""Samplers that ``strength`` enters late, with the steps of the whole run."""
