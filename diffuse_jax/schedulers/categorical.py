"""Run a sampler of class indices on a device; see :mod:`diffuse_jax.schedulers.vq_diffusion`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.schedulers.categorical_table import CategoricalTable, log_posterior
from diffuse_jax.schedulers.plan import check_key, draw_each, pad, room


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CategoricalPlan:
    """A run as a pytree, padded so that runs of any number of steps share one compilation.

    ``i`` below is the index of an evaluation, an int or a traced integer.
    """

    num_evaluations: Any
    timesteps: Any
    log_abc: Any
    num_classes: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_table(cls, table: CategoricalTable) -> CategoricalPlan:
        """Round a table to float32 and pad it."""
        return cls(
            num_evaluations=np.asarray(len(table), np.int32),
            timesteps=pad(table.timesteps, room(len(table))),
            log_abc=pad(table.log_abc, room(len(table))),
            num_classes=table.num_classes,
        )

    def init(self, batch: int, pixels: int) -> jax.Array:
        """The first sample, ``[batch, pixels]`` int32: every pixel is masked."""
        return jnp.full((batch, pixels), self.num_classes, jnp.int32)

    def timestep(self, i: Any) -> jax.Array:
        """The timestep that the network gets at evaluation ``i``, a float32 scalar."""
        return jnp.asarray(self.timesteps)[i]

    def log_posterior(self, x: jax.Array, i: Any, log_p_x0: jax.Array) -> jax.Array:
        """Log-probabilities ``[B, L, K + 1]`` of the sample after evaluation ``i``, the mask last."""
        return log_posterior(jnp.asarray(self.log_abc)[i], x, jnp.asarray(log_p_x0, jnp.float32), jnp)

    def step(
        self, x: jax.Array, i: Any, log_p_x0: jax.Array, key: jax.Array | None = None, *, uniform: Any = None
    ) -> jax.Array:
        """The sample after evaluation ``i``, ``[B, L]`` int32; clean classes after the last one.

        Args:
          x: the sample before it, class indices ``[B, L]``.
          i: index of the evaluation.
          log_p_x0: what the network returned, ``[B, L, K]``: log-probabilities of the clean classes.
          key: one typed key, or ``[B]`` keys, one per sample; ``i`` is folded in here.
          uniform: use these numbers ``[B, L, K + 1]`` in (0, 1) instead of drawing from ``key``.

        Raises:
          ValueError: neither ``key`` nor ``uniform`` was given, or the output has the wrong shape.
        """
        if log_p_x0.shape != (*x.shape, self.num_classes):
            want = (*x.shape, self.num_classes)
            raise ValueError(f"the network returned {log_p_x0.shape} for a sample of {x.shape}; expected {want}")
        shape = (*x.shape, self.num_classes + 1)
        if uniform is None:
            draw = functools.partial(jax.random.gumbel, dtype=jnp.float32)
            gumbel = draw_each(draw, check_key(key, x.shape[0]), i, shape)
        else:
            uniform = jnp.clip(jnp.asarray(uniform, jnp.float32), jnp.finfo(jnp.float32).tiny, 1 - 2.0**-24)
            gumbel = -jnp.log(-jnp.log(uniform))
        # The largest of log-probabilities with Gumbel noise is a draw from them.
        return jnp.argmax(self.log_posterior(x, i, log_p_x0) + gumbel, -1).astype(jnp.int32)
