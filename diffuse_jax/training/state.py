"""The numbers that training changes, and the compiled step that changes them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from diffuse_jax.models.base import Params
from diffuse_jax.sharding import automatic, automatic_shardings, param_shardings
from diffuse_jax.training.settings import Average

Metrics = dict[str, jax.Array]
Loss = Callable[[Params, Params, Any, jax.Array], tuple[jax.Array, Metrics]]
"""``loss(trainable, frozen, batch, key) -> (scalar, metrics)``: all that tells one training method from another."""


PLAIN = Average()
"""The running average where nothing else is asked for."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint must hold: together with the seed it decides the rest of the run."""

    step: jax.Array  # int32, optimiser updates made so far
    params: Params  # trainable, float32
    opt_state: Any
    ema: Params | None  # running average of params; None without --use_ema


def init_state(
    params: Params, optimizer: optax.GradientTransformation, use_ema: bool, mesh: Mesh | None = None
) -> TrainState:
    """A state at step 0, with copies of the parameters.

    Trainable parameters must be float32: updates are lost in lower precision. On a mesh every part is made where it
    stays, cut as :func:`~diffuse_jax.sharding.param_shardings` says, so no device ever holds a whole optimiser; and
    parameters that are cut like that already become the state's own, without a copy: do not use them any more.

    Raises:
      ValueError: a parameter has another dtype.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            raise ValueError(f"trainable parameter {jax.tree_util.keystr(path)} is {leaf.dtype}; load it as float32")

    def build(params: Params) -> TrainState:
        ema = jax.tree.map(jnp.copy, params) if use_ema else None
        return TrainState(jnp.int32(0), params, optimizer.init(params), ema)

    if mesh is None:
        return jax.jit(build)(jax.tree.map(jnp.array, params))
    shardings = param_shardings(jax.eval_shape(build, params), automatic(mesh))
    return jax.jit(build, out_shardings=shardings, donate_argnums=0)(jax.device_put(params, shardings.params))


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    seed: int,
    average: Average = PLAIN,
    shardings: Any = None,
) -> Callable[[TrainState, Params, Any], tuple[TrainState, Metrics]]:
    """Compile ``step(state, frozen, batch) -> (state, metrics)``; the old state's memory is re-used.

    Every array of ``batch`` is ``[accumulation steps, B, ...]``: the gradients of that many losses are averaged, one
    after the other, before the one update. The random key of part ``m`` of update ``n`` is
    ``fold_in(fold_in(key(seed), n), m)``. Metrics are means of the loss's, plus ``loss`` and ``grad_norm`` (before
    clipping).

    Args:
      loss: what is minimised.
      optimizer: how.
      seed: decides all random numbers of the run.
      average: of the running average, where the state has one.
      shardings: where the new state goes (:func:`diffuse_jax.sharding.param_shardings` of a state), and the mesh that
        networks compute on; None leaves that to the compiler.
    """
    shardings = automatic_shardings(shardings)
    mesh = None if shardings is None else jax.tree.leaves(shardings)[0].mesh.abstract_mesh

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))
    def step(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        # The mesh is what kernels that XLA cannot cut, and layers with parameters in parts, ask for.
        with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh):
            grads, metrics = mean_gradient(loss, state.params, frozen, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes counts with its rates
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        made = state.step + 1
        ema = None if state.ema is None else ema_update(state.ema, params, ema_rate(made, average))
        return TrainState(made, params, opt_state, ema), metrics | {"grad_norm": optax.tree.norm(grads)}

    return step


def mean_gradient(loss: Loss, params: Params, frozen: Params, batch: Any, key: jax.Array) -> tuple[Params, Metrics]:
    """Gradient and metrics of the mean loss over the parts of ``batch [parts, B, ...]``, one in memory at a time."""

    def part(m: Any, own: Any) -> tuple[Params, Metrics]:
        compute = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), grads = compute(params, frozen, own, jax.random.fold_in(key, m))
        return grads, metrics | {"loss": value}

    count = jax.tree.leaves(batch)[0].shape[0]
    first = jax.tree.map(lambda x: x[0], batch)
    if count == 1:
        return part(0, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, 0, first))
    add = lambda total, indexed: (jax.tree.map(jnp.add, total, part(*indexed)), None)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(count, dtype=jnp.int32), batch))
    return jax.tree.map(lambda x: x / count, total)


def ema_rate(updates: jax.Array, average: Average) -> jax.Array:
    """The decay after so many updates: the ramp of :class:`Average` with ``n = updates - update_after_step - 1``.

    It is 0 while ``n`` is not positive, which keeps the untrained start out of the average.
    """
    n = jnp.maximum(updates - average.update_after_step - 1, 0).astype(jnp.float32)
    ramp = (1 + n) / (10 + n) if average.inv_gamma is None else 1 - (1 + n / average.inv_gamma) ** -average.power
    return jnp.where(n > 0, jnp.clip(ramp, average.min_decay, average.decay), 0.0)


def ema_update(ema: Params, params: Params, decay: jax.Array) -> Params:
    """``decay * ema + (1 - decay) * params``, leaf by leaf."""
    return jax.tree.map(lambda old, new: old - (1 - decay) * (old - new), ema, params)
