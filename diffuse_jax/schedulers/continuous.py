"""The base of schedulers whose noise level is a function of time rather than a table of betas."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.noising import columns
from diffuse_jax.schedulers.scheduler import Scheduler

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuousScheduler(Scheduler, abstract=True):
    """Base of schedulers in continuous time; a subclass defines :meth:`level` and the range of times.

    Timesteps are the network's inputs, in :meth:`add_noise` and :meth:`velocity` too, and may be fractional.
    """

    absent: ClassVar[tuple[str, ...]] = (
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "timestep_spacing",
        "steps_offset",
    )

    limits_steps: ClassVar[bool] = False

    def level(self, t: Any, xp: Any = np) -> tuple[Any, Any]:
        """(alpha, sigma) at timesteps ``t``, with ``xp`` NumPy or ``jax.numpy``."""
        raise TypeError(f"{type(self).__name__} has no noise levels of its own")

    def train_levels(self) -> Array:
        """(alpha, sigma) at ``num_train_timesteps`` evenly spaced times."""
        low, high = self.timestep_range
        return np.stack(self.level(np.linspace(low, high, self.num_train_timesteps)), -1)

    @property
    def alpha_bar(self) -> Array:
        """Not available: noise levels are not derived from betas."""
        raise AttributeError(f"{self.class_name} is not made of betas; train_levels() has its noise levels")

    def _train_level(self, t: jax.Array) -> jax.Array:
        import jax.numpy as jnp

        return jnp.stack(self.level(jnp.asarray(t, jnp.float32), jnp), -1)

    def velocity(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """What a v-prediction network should return; see :func:`noise_schedule.predict_x0`."""
        import jax.numpy as jnp

        alpha, sigma = columns(self._train_level(t), x0)
        a, s = alpha * self.sigma_data, sigma / self.sigma_data
        v = (a * noise.astype(jnp.float32) - s * x0.astype(jnp.float32)) / jnp.hypot(a, sigma)
        return v.astype(x0.dtype)
