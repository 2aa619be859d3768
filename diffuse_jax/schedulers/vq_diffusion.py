r"""VQ-Diffusion, a diffusion of class indices: Gu et al. 2022 (arXiv 2111.14822).

A sample is a class index per latent pixel, one of K or the mask. Noise is a Markov chain (eq. 7 of the paper): a pixel
keeps its class with probability a + b, goes to any other class with b, to the mask with c, and a mask stays. That is
multiplication with matrices and a draw from a categorical distribution, not a linear combination of tensors, so this
sampler has a table and a ``step`` of its own:

* a row of the table has the logarithms of (a, b, c) for three pieces of the chain (eq. 8): from the beginning to the
  timestep of the evaluation, from the beginning to the timestep that the step goes to, and between the two;
* :func:`~diffuse_jax.schedulers.categorical_table.log_posterior` (eq. 5 and 11) turns a prediction of the clean
  classes into the distribution of the next sample, in logarithms, for NumPy and JAX alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers.categorical_table import CategoricalTable, log_abc
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.request import chosen_steps
from diffuse_jax.schedulers.scheduler import Scheduler

if TYPE_CHECKING:
    from diffuse_jax.schedulers.categorical import CategoricalPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQDiffusionScheduler(Scheduler):
    """Mask-and-replace diffusion; see the module. ``num_vec_classes`` counts the mask.

    ``alpha_cum_start`` to ``alpha_cum_end`` is the probability that a pixel has not been touched, ``gamma_cum_start``
    to ``gamma_cum_end`` the probability that it is masked, each linear in the timestep.

    :meth:`plan` returns a plan for class indices::

        plan = scheduler.plan(100)
        x = plan.init(batch, pixels)                      # all masked
        for i in range(100):
            log_p_x0 = network(x, plan.timestep(i))       # [B, L, K], log-probabilities of the clean classes
            x = plan.step(x, i, log_p_x0, keys)
    """

    num_vec_classes: int
    num_train_timesteps: int = 100
    alpha_cum_start: float = 0.99999
    alpha_cum_end: float = 0.000009
    gamma_cum_start: float = 0.000009
    gamma_cum_end: float = 0.99999

    absent: ClassVar[tuple[str, ...]] = (
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "timestep_spacing",
        "steps_offset",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_vec_classes < 2:
            raise ValueError(f"num_vec_classes counts the mask and at least one class, got {self.num_vec_classes}")
        for place in ("start", "end"):
            alpha, gamma = (getattr(self, f"{name}_cum_{place}") for name in ("alpha", "gamma"))
            if min(alpha, gamma) <= 0 or alpha + gamma > 1:
                raise ValueError(
                    f"alpha_cum_{place}={alpha} and gamma_cum_{place}={gamma} are probabilities of things that exclude"
                    " each other; both must be above 0 and their sum at most 1"
                )

    def transitions(self, timesteps: Array) -> Array:
        """(a, c) from the beginning to the timesteps, ``[n, 2]``; timestep -1 is the beginning."""
        share = timesteps / max(1, self.num_train_timesteps - 1)
        a = self.alpha_cum_start + share * (self.alpha_cum_end - self.alpha_cum_start)
        c = self.gamma_cum_start + share * (self.gamma_cum_end - self.gamma_cum_start)
        return np.where((timesteps >= 0)[:, None], np.stack([a, c], -1), (1.0, 0.0))

    def plan(self, num_inference_steps: int | None = None, **options: Any) -> CategoricalPlan:  # type: ignore[override]
        """The run as a pytree for the device; arguments as for :meth:`table`."""
        from diffuse_jax.schedulers.categorical import CategoricalPlan  # imports JAX

        return CategoricalPlan.from_table(self.table(num_inference_steps, **options))

    def table(  # type: ignore[override]
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        as_published: bool = False,
    ) -> CategoricalTable:
        """The run as a float64 table.

        Args:
          num_inference_steps: the last so many timesteps of a run, as in diffusers; or else
          timesteps: descending whole training timesteps; the last step goes from the last of them to clean classes.
          as_published: spread the steps evenly over training (the paper's fast inference, section 4.2).

        Raises:
          ValueError: arguments contradict each other or are invalid; the message says what is valid.
        """
        n, t, _ = chosen_steps(self, num_inference_steps, timesteps, None)
        if t is None and not as_published:
            t = np.arange(n, dtype=np.float64)[::-1]
        elif t is None:
            t = ns.space_timesteps("linspace", self.num_train_timesteps, n, 0)
            t[0] = self.num_train_timesteps - 1  # one step, too, starts from masks
        here, there = self.transitions(t), self.transitions(np.append(t[1:], -1.0))
        # Untouched is untouched in both pieces; not masked is not masked in both.
        between = np.stack([here[:, 0] / there[:, 0], 1 - (1 - here[:, 1]) / (1 - there[:, 1])], -1)
        classes = self.num_vec_classes - 1
        return CategoricalTable(t, np.stack([log_abc(p, classes) for p in (here, there, between)], 1), classes)
