"""The training state, and the compiled step that updates it."""

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

from diffuse_jax.kernels import compiler_options
from diffuse_jax.models.base import Params
from diffuse_jax.sharding import automatic, automatic_shardings, param_shardings
from diffuse_jax.training.settings import Average

Metrics = dict[str, jax.Array]
Loss = Callable[[Params, Params, Any, jax.Array], tuple[jax.Array, Metrics]]
"""``loss(trainable, frozen, batch, key) -> (scalar, metrics)``: all that distinguishes one training method from
another."""

AVERAGE = "average"
"""The name under which a loss finds the running average of the trained parameters among the frozen ones, if the state
has one."""

PLAIN = Average()
"""The default settings of the running average."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint must contain: together with the seed and the data, it determines the rest of the
    run."""

    step: jax.Array  # int32, completed training steps
    params: Params  # trainable, float32
    opt_state: Any
    ema: Params | None  # running average of params; None without --use_ema


def init_state(
    params: Params, optimizer: optax.GradientTransformation, use_ema: bool, mesh: Mesh | None = None
) -> TrainState:
    """The state at step 0, with copies of the parameters.

    Trainable parameters must be float32, since lower precision loses updates. On a mesh, every shard is created on its
    device, according to :func:`~diffuse_jax.sharding.param_shardings`, so no device ever holds the whole optimiser
    state. Parameters that already have this sharding are donated to the state without a copy: do not use them
    afterwards.

    Raises:
      ValueError: a parameter is not float32.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            raise ValueError(f"trainable parameter {jax.tree_util.keystr(path)} is {leaf.dtype}; load it as float32")

    build = functools.partial(fresh_state, optimizer=optimizer, use_ema=use_ema)
    if mesh is None:
        return jax.jit(build)(jax.tree.map(jnp.array, params))
    shardings = param_shardings(jax.eval_shape(build, params), automatic(mesh))
    return jax.jit(build, out_shardings=shardings, donate_argnums=0)(jax.device_put(params, shardings.params))


def fresh_state(params: Params, optimizer: optax.GradientTransformation, use_ema: bool) -> TrainState:
    """The state at step 0 of these parameters, which it does not copy."""
    ema = jax.tree.map(jnp.copy, params) if use_ema else None
    return TrainState(jnp.int32(0), params, optimizer.init(params), ema)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    seed: int,
    average: Average = PLAIN,
    shardings: Any = None,
) -> Callable[[TrainState, Params, Any], tuple[TrainState, Metrics]]:
    """Compile ``step(state, frozen, batch) -> (state, metrics)``, which reuses the memory of the old state.

    Every array of ``batch`` is ``[accumulation steps, B, ...]``: gradients are accumulated over the first axis, one
    batch at a time, and averaged before the update. Accumulation step ``m`` of training step ``n`` uses the random key
    ``fold_in(fold_in(key(seed), n), m)``. The metrics are the means of the loss's metrics, plus ``loss`` and
    ``grad_norm`` (before clipping).

    Args:
      loss: the loss to minimise; it may read the running average before the step, as ``frozen[AVERAGE]``.
      optimizer: the optimiser.
      seed: determines all random numbers of the loss.
      average: settings of the running average, if the state has one.
      shardings: shardings of the new state (:func:`diffuse_jax.sharding.param_shardings` of a state), which also give
        the mesh on which networks compute; None leaves the placement to the compiler.
    """
    shardings = automatic_shardings(shardings)
    mesh = None if shardings is None else jax.tree.leaves(shardings)[0].mesh.abstract_mesh

    def step(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        # Kernels that XLA cannot partition and layers with sharded parameters look up the mesh.
        with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh):
            given = frozen if state.ema is None else {**frozen, AVERAGE: state.ema}
            grads, metrics = mean_gradient(loss, state.params, given, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts with float rates
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        done = state.step + 1
        ema = None if state.ema is None else ema_update(state.ema, params, ema_rate(done, average))
        return TrainState(done, params, opt_state, ema), metrics | {"grad_norm": optax.tree.norm(grads)}

    out = None if shardings is None else (shardings, None)
    return jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=compiler_options())


def mean_gradient(loss: Loss, params: Params, frozen: Params, batch: Any, key: jax.Array) -> tuple[Params, Metrics]:
    """Gradient and metrics of the mean loss over ``batch [accumulation steps, B, ...]``, accumulated one by one."""

    def part(m: Any, batch: Any) -> tuple[Params, Metrics]:
        compute = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), grads = compute(params, frozen, batch, jax.random.fold_in(key, m))
        return grads, metrics | {"loss": value}

    count = jax.tree.leaves(batch)[0].shape[0]
    first = jax.tree.map(lambda x: x[0], batch)
    if count == 1:
        return part(0, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, 0, first))
    add = lambda total, indexed: (jax.tree.map(jnp.add, total, part(*indexed)), None)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(count, dtype=jnp.int32), batch))
    return jax.tree.map(lambda x: x / count, total)


def ema_rate(steps: jax.Array, average: Average) -> jax.Array:
    """The decay after ``steps`` training steps: the ramp of :class:`Average` with ``n = steps - update_after_step -
    1``.

    It is 0 while ``n`` is not positive, which keeps the initial parameters out of the average. Without a ramp, it is
    ``decay`` in every step after ``update_after_step``.
    """
    if not average.ramp:
        return jnp.where(steps > average.update_after_step, jnp.float32(average.decay), 0.0)
    n = jnp.maximum(steps - average.update_after_step - 1, 0).astype(jnp.float32)
    ramp = (1 + n) / (10 + n) if average.inv_gamma is None else 1 - (1 + n / average.inv_gamma) ** -average.power
    return jnp.where(n > 0, jnp.clip(ramp, average.min_decay, average.decay), 0.0)


def ema_update(ema: Params, params: Params, decay: jax.Array) -> Params:
    """``decay * ema + (1 - decay) * params``, leaf by leaf."""
    return jax.tree.map(lambda old, new: old - (1 - decay) * (old - new), ema, params)
