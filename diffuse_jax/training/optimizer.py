"""AdamW with clipping, and the learning rates over a run."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import optax

DECAY_SHARE = 1 / 3
"""Share of a ``warmup_stable_decay`` run in which the rate falls."""

SCHEDULES: dict[str, Callable[[jnp.ndarray], jnp.ndarray]] = {
    "constant": lambda p: jnp.ones_like(p),
    "constant_with_warmup": lambda p: jnp.ones_like(p),
    "linear": lambda p: 1 - p,
    "cosine": lambda p: 0.5 * (1 + jnp.cos(jnp.pi * p)),
    "warmup_stable_decay": lambda p: jnp.minimum(1.0, (1 - p) / DECAY_SHARE),
}
"""Factor on the rate as a function of ``p``, the share of the run after the warm-up that is over (0 to 1).

``warmup_stable_decay`` is constant until its last third, so a run can be resumed with another
``--max_train_steps``.
"""


def learning_rate(name: str, peak: float, warmup: int, total: int) -> optax.Schedule:
    """The rate at each update: a linear ramp to ``peak`` over ``warmup`` updates, then the named schedule to ``total``.

    Raises:
      ValueError: the name is not known, or the warm-up is longer than the run.
    """
    if name not in SCHEDULES:
        raise ValueError(f"lr_scheduler must be one of {sorted(SCHEDULES)}, got {name!r}")
    warmup = 0 if name == "constant" else warmup
    if warmup >= total:
        raise ValueError(f"lr_warmup_steps {warmup} must be smaller than max_train_steps {total}")

    def rate(step: jnp.ndarray) -> jnp.ndarray:
        s = jnp.asarray(step, jnp.float32)
        p = jnp.clip((s - warmup) / (total - warmup), 0.0, 1.0)
        return peak * jnp.where(s < warmup, s / max(warmup, 1), SCHEDULES[name](p))

    return rate


def adamw(
    rate: optax.Schedule,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.01,
    epsilon: float = 1e-8,
    max_grad_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping the gradient to a global norm."""
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(rate, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay),
    )
