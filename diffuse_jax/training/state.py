"""The numbers that training changes, and the compiled step that changes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffuse_jax.models.base import Params

Metrics = dict[str, jax.Array]
Loss = Callable[[Params, Params, Any, jax.Array], tuple[jax.Array, Metrics]]
"""``loss(trainable, frozen, batch, key) -> (scalar, metrics)``: all that tells one training method from another."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint must hold: together with the seed it decides the rest of the run."""

    step: jax.Array  # int32, optimiser updates made so far
    params: Params  # trainable, float32
    opt_state: Any
    ema: Params | None  # running average of params; None without --use_ema


def init_state(params: Params, optimizer: optax.GradientTransformation, use_ema: bool) -> TrainState:
    """A state at step 0. Trainable parameters must be float32: updates are lost in lower precision.

    Raises:
      ValueError: a parameter has another dtype.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            raise ValueError(f"trainable parameter {jax.tree_util.keystr(path)} is {leaf.dtype}; load it as float32")
    params = jax.tree.map(jnp.array, params)
    ema = jax.tree.map(jnp.copy, params) if use_ema else None
    return TrainState(jnp.int32(0), params, optimizer.init(params), ema)


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, seed: int, ema_decay: float = 0.9999
) -> Callable[[TrainState, Params, Any], tuple[TrainState, Metrics]]:
    """Compile ``step(state, frozen, batch) -> (state, metrics)``; the old state's memory is re-used.

    The random key of update ``n`` is ``fold_in(key(seed), n)``. Metrics are those of the loss, plus ``loss`` and
    ``grad_norm`` (before clipping).
    """

    @jax.jit(donate_argnums=0)
    def step(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        count = state.step + 1
        ema = None if state.ema is None else ema_update(state.ema, params, ema_rate(count, ema_decay))
        metrics = metrics | {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return TrainState(count, params, opt_state, ema), metrics

    return step


def ema_rate(updates: jax.Array, decay: float) -> jax.Array:
    """The decay after so many updates: ``(1 + n) / (10 + n)`` with ``n = updates - 1``, at most ``decay``; 0 at first.

    The ramp keeps the untrained start out of the average.
    """
    n = jnp.maximum(updates - 1, 0).astype(jnp.float32)
    return jnp.where(n > 0, jnp.minimum((1 + n) / (10 + n), decay), 0.0)


def ema_update(ema: Params, params: Params, decay: jax.Array) -> Params:
    """``decay * ema + (1 - decay) * params``, leaf by leaf."""
    return jax.tree.map(lambda old, new: old - (1 - decay) * (old - new), ema, params)
