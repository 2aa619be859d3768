"""Run a sampler's table on a device: one pytree of padded arrays and one ``step`` for every sampler.

All plans have the same shapes and, but for dynamic thresholding and learned variance, the same static structure. A
function that takes a plan as an argument is therefore compiled once for all samplers and all numbers of steps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.rounding import power_of_two
from diffuse_jax.schedulers import brownian
from diffuse_jax.schedulers.table import MEMORY, Table

CAPACITY = 2048
"""Evaluations that every plan has room for: two for each of 1000 training timesteps, rounded up."""


class State(NamedTuple):
    """What one evaluation hands to the next.

    Attributes:
      sample: float32 ``[B, ...]``.
      memory: earlier samples or outputs, of the same shape; what multistep samplers combine.
      kept: name -> arrays that a pipeline's parts keep; samplers do not look at it.
    """

    sample: jax.Array
    memory: tuple[jax.Array, ...]
    kept: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """A sampling run as a pytree of float32 arrays, padded to ``CAPACITY`` rows or more; :class:`Table` has the fields.

    The entries from ``num_evaluations`` on are padding. ``i`` below is the index of a model evaluation: an int or a
    traced integer, or ``[B]`` of them, one for each sample, so that samples at different places of the run make their
    steps in one call (Shih et al. 2023, 'Parallel Sampling of Diffusion Models', arXiv 2305.16317).
    """

    num_evaluations: Any
    timesteps: Any
    input_scale: Any
    to_x0: Any
    levels: Any
    known: Any
    rows: Any
    log_variance: Any
    interval: Any
    init_scale: Any
    clip: Any
    threshold: Any
    thresholding: bool = dataclasses.field(metadata={"static": True}, default=False)
    learned_variance: str = dataclasses.field(metadata={"static": True}, default="")

    @classmethod
    def from_table(cls, table: Table) -> Plan:
        """Round a table to float32 and pad it."""
        capacity, f32 = room(len(table)), np.float32
        return cls(
            num_evaluations=np.asarray(len(table), np.int32),
            timesteps=pad(table.timesteps, capacity),
            input_scale=pad(table.input_scale, capacity),
            to_x0=pad(table.to_x0, capacity),
            levels=pad(table.levels, capacity + 1),
            known=pad(table.known, capacity + 1),
            rows=pad(table.rows, capacity),
            log_variance=pad(table.log_variance, capacity),
            interval=pad(table.interval, capacity),
            init_scale=np.asarray(table.init_scale, f32),
            clip=np.asarray(table.clip, f32),
            threshold=np.asarray(table.threshold or (1.0, 1.0), f32),
            thresholding=table.threshold is not None,
            learned_variance=table.learned_variance,
        )

    def init(self, noise: jax.Array, x0: jax.Array | None = None) -> State:
        """The first state: scaled ``noise [B, ...]``, or (image to image) ``x0`` noised to the first level."""
        return self.resume(self.init_scale * _f32(noise) if x0 is None else self.noised(x0, noise, 0))

    def resume(self, sample: jax.Array) -> State:
        """Start from a sample already in this sampler's coordinates, such as the one that another plan stopped at."""
        sample = _f32(sample)
        return State(sample, (jnp.zeros_like(sample),) * MEMORY)

    def timestep(self, i: Any) -> jax.Array:
        """The timestep that the network gets at evaluation ``i``, a float32 scalar (``[B]`` for ``[B]`` indices)."""
        return _at(self.timesteps, i)

    def model_input(self, state: State, i: Any) -> jax.Array:
        """The scaled sample that the network gets at evaluation ``i``, float32 ``[B, ...]``."""
        return _over(_at(self.input_scale, i), state.sample) * state.sample

    def noised(self, x0: jax.Array, noise: jax.Array, i: Any) -> jax.Array:
        """``x0`` with ``noise`` at the level (:attr:`Table.known`) before evaluation ``i``; clean after the last."""
        x0 = _f32(x0)
        alpha, sigma = _columns(_at(self.known, i), x0)
        return alpha * x0 + sigma * _f32(noise)

    def blend(self, state: State, i: Any, x0: jax.Array, noise: jax.Array, known: jax.Array) -> State:
        """The state after evaluation ``i`` with the known part of an image put in, for inpainting.

        Args:
          state: what ``step`` returned for evaluation ``i``.
          i: index of that evaluation.
          x0: the image, ``[B, ...]`` (values where it is not known do not matter).
          noise: Gaussian noise to take the image to the level of the sample; after the last evaluation there is none.
          known: 1 where the image is known, 0 where not, of a shape that broadcasts to the sample's.
        """
        known = jnp.broadcast_to(_f32(known), state.sample.shape)
        # A selection instead of a weighted sum if the mask is binary, so that no value of the unknown part leaks
        # through.
        there = jnp.where(known > 0, self.noised(x0, noise, jnp.asarray(i) + 1), 0.0)
        return state._replace(sample=known * there + (1 - known) * state.sample)

    def predict_x0(self, state: State, i: Any, model_output: jax.Array) -> jax.Array:
        """The clean sample predicted by the output, clipped or thresholded as configured, ``[B, ...]``."""
        return self._x0(state.sample, i, self._split(state.sample, model_output)[0])

    def _x0(self, sample: jax.Array, i: Any, output: jax.Array) -> jax.Array:
        of_sample, of_output = _columns(_at(self.to_x0, i), sample)
        x0 = of_sample * sample + of_output * output
        if not self.thresholding:
            return jnp.clip(x0, -self.clip, self.clip)
        s = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), self.threshold[0], axis=1)
        s = jnp.clip(s, 1.0, self.threshold[1]).reshape(-1, *[1] * (x0.ndim - 1))
        return jnp.clip(x0, -s, s) / s

    def step(
        self, state: State, i: Any, model_output: jax.Array, key: jax.Array | None = None, *, noise: Any = None
    ) -> State:
        """The state after evaluation ``i``.

        Args:
          state: the state before it.
          i: index of the evaluation.
          model_output: what the network returned, ``[B, ..., C]`` or ``[B, ..., 2 C]`` with a variance in the second
            half (used with a learned variance, ignored otherwise).
          key: one typed key, or ``[B]`` keys, one per sample; the same in all steps of a run. ``i`` is folded in here,
            or the noise follows the key's Brownian path. Deterministic samplers do not draw from it. ``[B]`` indices
            need ``[B]`` keys.
          noise: use this ``[B, ...]`` instead of drawing from ``key``.

        Raises:
          ValueError: neither ``key`` nor ``noise`` was given, or the output has the wrong shape.
        """
        sample = state.sample
        output, variance = self._split(sample, model_output)
        noise = self.draw(i, sample.shape, key) if noise is None else _f32(noise)
        if variance is not None:
            noise = noise * self._spread(sample, i, variance)
        return _combined(_at(self.rows, i), state, self._x0(sample, i, output), output, noise)

    def transition(self, state: State, i: Any, model_output: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The Gaussian from which :meth:`step` draws the sample after evaluation ``i``.

        Args:
          state, i, model_output: as for :meth:`step`.

        Returns:
          The mean float32 ``[B, ...]`` and the standard deviation, of a shape that broadcasts to it; 0 where the
          sampler adds no noise.

        Raises:
          ValueError: the output has the wrong shape.
        """
        sample, row = state.sample, _at(self.rows, i)
        output, variance = self._split(sample, model_output)
        mean = _combined(row, state, self._x0(sample, i, output), output, jnp.zeros_like(sample)).sample
        std = jnp.abs(_over(jnp.asarray(row[..., 0, -1]), sample))
        return mean, std if variance is None else std * self._spread(sample, i, variance)

    def log_prob(self, state: State, i: Any, model_output: jax.Array, sample: jax.Array) -> jax.Array:
        """The log-density, float32 ``[B]``, of ``sample [B, ...]`` as the sample after evaluation ``i``.

        It is differentiable with respect to all arrays. A step without noise has no density; its value is 0.

        Args:
          state, i, model_output: as for :meth:`step`.
          sample: the sample that :meth:`step` returned, or any other.

        Raises:
          ValueError: the output has the wrong shape.
        """
        mean, std = self.transition(state, i, model_output)
        drawn = jnp.broadcast_to(std > 0, mean.shape)
        std = jnp.where(std > 0, std, 1.0)
        each = -0.5 * jnp.square((_f32(sample) - mean) / std) - jnp.log(std) - 0.5 * math.log(2 * math.pi)
        return jnp.where(drawn, each, 0.0).sum(tuple(range(1, mean.ndim)))

    def _spread(self, sample: jax.Array, i: Any, variance: jax.Array) -> jax.Array:
        """The standard deviation that a learned variance stands for, ``[B, ...]``."""
        if self.learned_variance == "learned":
            return jnp.sqrt(jnp.maximum(variance, 0.0))
        low, high = _columns(_at(self.log_variance, i), sample)
        return jnp.exp(0.5 * (low + 0.5 * (variance + 1) * (high - low)))

    def draw(self, i: Any, shape: tuple[int, ...], key: jax.Array | None) -> jax.Array:
        """The noise of evaluation ``i`` as :meth:`step` draws it from ``key``, float32 ``shape = [B, ...]``.

        Zeros where the sampler uses none.
        """
        key = check_key(key, shape[0])
        if jnp.ndim(i) > key.ndim:
            raise ValueError(f"samples at different evaluations need a key each, {shape[0]} keys, got one")

        return _drawn(_at(self.rows, i)[..., -1], _at(self.interval, i), key, i, shape=tuple(shape))

    def _split(self, sample: jax.Array, output: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        doubled = (*sample.shape[:-1], 2 * sample.shape[-1])
        if output.shape == doubled:
            mean, variance = jnp.split(_f32(output), 2, axis=-1)
            return mean, variance if self.learned_variance else None
        if output.shape != sample.shape or self.learned_variance:
            want = doubled if self.learned_variance else sample.shape
            raise ValueError(f"the network returned {output.shape} for a sample of {sample.shape}; expected {want}")
        return _f32(output), None


# Compiled once for each shape and dtype, even if every step is called from Python; inside a larger program they are
# inlined. Called eagerly, control flow over newly created closures would be compiled again at each call.


@functools.partial(jax.jit, inline=True)
def _combined(row: jax.Array, state: State, x0: jax.Array, output: jax.Array, noise: jax.Array) -> State:
    """The next sample and memory: each row's combination of the stack."""
    stack = (state.sample, x0, output, *state.memory, noise)
    # Multiply-adds, not a matmul: a TPU would do a matmul in bfloat16.
    new = [sum(_over(row[..., r, k], x0) * x for k, x in enumerate(stack)) for r in range(1 + MEMORY)]
    return state._replace(sample=new[0], memory=tuple(new[1:]))


@functools.partial(jax.jit, static_argnames="shape", inline=True)
def _drawn(weights: jax.Array, interval: jax.Array, key: jax.Array, i: jax.Array, *, shape: tuple[int, ...]) -> Any:
    """The noise of evaluation ``i``, whose row of the table gives it ``weights`` in what follows."""

    def fresh() -> jax.Array:
        return draw_each(normal, key, i, shape)

    start, end = jnp.moveaxis(brownian.ticks(jnp.asarray(interval)), -1, 0)

    def follow() -> jax.Array:
        if key.ndim == 0:
            return brownian.increment(key, start, end, shape)
        piece = (jnp.broadcast_to(tick, key.shape) for tick in (start, end))
        return jax.vmap(lambda k, a, b: brownian.increment(k, a, b, shape[1:]))(key, *piece)

    def both() -> jax.Array:
        path = follow()
        return jnp.where(_over(start < end, path), path, fresh())

    used, on_path = jnp.any(weights != 0), jnp.any(start < end)
    along = follow if jnp.ndim(start) == 0 else both
    which = jnp.where(used, 1 + on_path.astype(jnp.int32), 0)
    return jax.lax.switch(which, (lambda: jnp.zeros(shape, jnp.float32), fresh, along))


def check_key(key: jax.Array | None, batch: int) -> jax.Array:
    """The key, or an error that says what it has to be: one typed key, or one for each of ``batch`` samples."""
    if key is None:
        raise ValueError("step needs a key (one, or one per sample) or noise=; samplers without noise do not use it")
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        got = f"an array of {key.dtype}" if hasattr(key, "dtype") else repr(key)
        raise ValueError(f"key must be made by jax.random.key (a typed key), got {got}")
    if key.ndim not in (0, 1) or (key.ndim == 1 and key.shape[0] != batch):
        raise ValueError(f"key must be one key or {batch} keys (one per sample), got shape {key.shape}")
    return key


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise in float32, whatever JAX's default dtype is."""
    return jax.random.normal(key, shape, jnp.float32)


def draw_each(draw: Callable[..., jax.Array], key: jax.Array, i: Any, shape: tuple[int, ...]) -> jax.Array:
    """``draw(key, shape)`` with ``i`` folded into the key, ``shape`` being ``[B, ...]``; ``[B]`` keys draw one each."""
    if key.ndim == 0:
        return draw(jax.random.fold_in(key, i), shape)
    keys = jax.vmap(jax.random.fold_in)(key, jnp.broadcast_to(i, key.shape))
    return jax.vmap(lambda k: draw(k, shape[1:]))(keys)


def _f32(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _at(array: Any, i: Any) -> Any:
    # A NumPy plan outside of jit is indexed on the host; a traced index needs a JAX array.
    return array[i] if isinstance(i, int) else jnp.asarray(array)[i]


def _over(c: Any, sample: Any) -> Any:
    """A coefficient, or one for each sample, as a factor of ``sample [B, ...]``."""
    return c if jnp.ndim(c) == 0 else jnp.reshape(c, (-1, *[1] * (sample.ndim - 1)))


def _columns(c: Any, sample: Any) -> tuple[Any, Any]:
    """The two coefficients in ``c [2]`` or ``[B, 2]`` as factors of ``sample [B, ...]``."""
    return _over(c[..., 0], sample), _over(c[..., 1], sample)


def room(evaluations: int) -> int:
    """Rows that a plan of so many evaluations has."""
    return max(CAPACITY, power_of_two(evaluations))


def pad(array: np.ndarray, length: int) -> np.ndarray:
    """``array`` in float32 with zeros appended up to ``length``."""
    out = np.zeros((length, *array.shape[1:]), np.float32)
    out[: len(array)] = array
    return out
