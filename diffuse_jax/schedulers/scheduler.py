"""What all schedulers share besides settings: the training schedule, adding noise, and choosing the steps to run.

A scheduler is a frozen configuration plus two methods in float64 NumPy: ``grid`` (where the network is evaluated) and
``evaluations`` (one :class:`Row` per evaluation).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np

from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers import noising, request
from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.configuration import SCHEDULERS, SchedulerConfig
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Evaluation, Grid, Level, Row, Table

if TYPE_CHECKING:
    import jax

    from diffuse_jax.schedulers.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheduler(SchedulerConfig, abstract=True):
    """Base of all schedulers: a configuration that turns a number of steps into a table.

    ``Scheduler.from_config`` and ``Scheduler.from_pretrained`` pick the class that the JSON names; the same methods of
    a subclass build that subclass from the configuration of any other. A subclass defined outside the package is found
    by its name too, once its module is imported.
    """

    grid_options: ClassVar[tuple[str, ...]] = ()
    step_options: ClassVar[tuple[str, ...]] = ()
    """Keywords that :meth:`plan` hands to ``grid`` and to ``evaluations``."""
    coordinates: ClassVar[str] = "preserving"
    """The sampler's coordinates, one of ``noise_schedule.COORDINATES``."""
    sigma_data: ClassVar[float] = 1.0
    """Spread of clean samples that the network's preconditioning was made for (Karras et al. 2022)."""
    limits_steps: ClassVar[bool] = True
    """There are no more steps than ``num_train_timesteps``."""
    final_sigma_given: ClassVar[bool] = True
    """Explicit ``sigmas`` end with the level after the last step."""
    ascends: ClassVar[bool] = False
    """The run goes from an image to noise: timesteps and sigmas ascend, and ``strength`` runs the first steps."""

    # ---- the training schedule -------------------------------------------------------------------------------------

    @cached_property
    def alpha_bar(self) -> Array:
        """Cumulative product of ``1 - beta``, float64 ``[num_train_timesteps]``."""
        return ns.alpha_bar_table(
            self.beta_schedule,
            self.beta_start,
            self.beta_end,
            self.num_train_timesteps,
            self.trained_betas,
            getattr(self, "rescale_betas_zero_snr", False),
        )

    @cached_property
    def sigma_table(self) -> Array:
        """``sqrt((1 - alpha_bar) / alpha_bar)``, ascending; zero terminal SNR is kept just finite."""
        return ns.exploding_sigmas(self.alpha_bar)

    def train_levels(self) -> Array:
        """(alpha, sigma) of every training timestep in the sampler's coordinates, ``[num_train_timesteps, 2]``."""
        if self.coordinates == "exploding":
            return sg.with_alpha(self.sigma_table, "exploding")
        return ns.preserving_levels(self.alpha_bar)

    def _train_level(self, t: jax.Array) -> jax.Array:
        """(alpha, sigma) at training timesteps, ``[*t.shape, 2]``."""
        return noising.lookup(self.train_levels(), t)

    def add_noise(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """``x0 [B, ...]`` noised to training timesteps ``t`` (``[B]`` or a scalar), in the sampler's coordinates.

        Computed in float32, returned in the dtype of ``x0``.
        """
        return noising.noised(self._train_level(t), x0, noise)

    def network_input(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """What the network is given of :meth:`add_noise`'s samples at ``t``: scaled to unit variance if their variance
        grows with the noise, otherwise unchanged."""
        if self.coordinates != "exploding":
            return x
        import jax.numpy as jnp

        alpha, sigma = noising.columns(self._train_level(t), x)
        return (x / jnp.hypot(alpha * self.sigma_data, sigma)).astype(x.dtype)

    def velocity(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """What a v-prediction network should return: ``alpha * noise - sigma * x0`` (Salimans and Ho 2022)."""
        return noising.velocity(noising.lookup(ns.preserving_levels(self.alpha_bar), t), x0, noise)

    # ---- what a sampler defines ------------------------------------------------------------------------------------

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        """The levels of a run of ``n`` steps, from explicit ``timesteps`` or ``sigmas`` if given."""
        self._refuse_to_sample()

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        """One row per model evaluation, beginning with step ``begin`` of the grid."""
        self._refuse_to_sample()

    def _refuse_to_sample(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} does not sample; use one of {sorted(SCHEDULERS)}")

    def evaluation(self, timestep: float, level: Level) -> Evaluation:
        """The unit vectors of one evaluation under this configuration."""
        return Evaluation(
            timestep,
            level,
            self.prediction_type,
            corrected=self.corrects_x0,
            sigma_data=self.sigma_data,
            input_scale=1.0 if self.coordinates == "flow" else None,
        )

    @property
    def timestep_range(self) -> tuple[float, float]:
        """Lowest and highest timestep that the network may be given."""
        return 0.0, self.num_train_timesteps - 1.0

    @property
    def explicit_range(self) -> tuple[float, float]:
        """Lowest and highest of the ``timesteps`` that :meth:`plan` takes."""
        return self.timestep_range

    @property
    def learned_variance(self) -> str:
        """How the second half of the network's output is used: "" (ignored), "learned" or "learned_range"."""
        return ""

    def _correction(self) -> dict[str, Any]:
        if getattr(self, "thresholding", False):
            return {"threshold": (self.dynamic_thresholding_ratio, self.sample_max_value)}  # type: ignore[attr-defined]
        return {"clip": self.clip_sample_range} if getattr(self, "clip_sample", False) else {}  # type: ignore[attr-defined]

    @property
    def corrects_x0(self) -> bool:
        """Whether predicted clean samples are clipped or thresholded."""
        return bool(self._correction())

    # ---- the run ---------------------------------------------------------------------------------------------------

    def plan(self, num_inference_steps: int | None = None, **options: Any) -> Plan:
        """The run as a pytree for the device; arguments as for :meth:`table`."""
        from diffuse_jax.schedulers.plan import Plan  # imports JAX

        return Plan.from_table(self.table(num_inference_steps, **options))

    def table(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        strength: float | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        **options: Any,
    ) -> Table:
        """The run as a float64 table.

        Args:
          num_inference_steps: number of steps; or else one of
          timesteps: descending training timesteps, one per step;
          sigmas: descending noise levels ``sigma / alpha``, one per step and the final one (samplers based on sigmas).
            Samplers that run from an image to noise take both ascending.
          strength: in (0, 1], the share of the steps that is run, the last ones (image to image); the first ones of a
            run from an image to noise.
          denoising_start, denoising_end: in (0, 1), the share of the training schedule to leave to the model before and
            after this one; the sample is handed over with its noise.
          **options: of the scheduler at hand, see ``grid_options`` and ``step_options``.

        Raises:
          ValueError: arguments contradict each other or are invalid; the message says what is valid.
        """
        n, t, s = request.chosen_steps(self, num_inference_steps, timesteps, sigmas)
        request.check_strength(strength)
        grid_options, step_options = request.split_options(self, options)
        request.check_whole(self, denoising_start, denoising_end)
        grid = self.grid(n, timesteps=t, sigmas=s, **grid_options)
        if (strength, denoising_start, denoising_end) != (None, None, None):
            request.check_one_way(self, grid.timesteps)
        begin = 0 if self.ascends else self._begin(n, grid, strength, denoising_start)
        rows = self.evaluations(grid, begin, **step_options)
        learned = self.learned_variance
        table = Table.build(rows, grid.init_scale, grid.final, **self._correction(), learned_variance=learned)
        request.check_finite(self, table)
        if self.ascends and strength is not None:
            return table.cut(request.steps_to_run(n, strength))
        return table if denoising_end is None else self._stop(table, denoising_end)

    def _begin(self, n: int, grid: Grid, strength: float | None, denoising_start: float | None) -> int:
        """The first step to run."""
        if denoising_start is None:
            return 0 if strength is None else n - request.steps_to_run(n, strength)
        if strength is not None:
            raise ValueError("give strength or denoising_start, not both: each says where to start")
        begin = int(np.sum(grid.timesteps >= self._cutoff("denoising_start", denoising_start)))
        if begin == len(grid.timesteps):
            raise ValueError(f"denoising_start={denoising_start} leaves none of {n} steps; use a smaller value")
        return begin

    def _stop(self, table: Table, share: float) -> Table:
        """The table without the evaluations that ``denoising_end`` leaves to another model."""
        keep = int(np.sum(table.timesteps >= self._cutoff("denoising_end", share)))
        if keep == 0:
            raise ValueError(
                f"denoising_end={share} leaves no step: the first timestep is {table.timesteps[0]:g};"
                " use a larger value"
            )
        return table.cut(keep)

    def _cutoff(self, name: str, share: float) -> float:
        """The timestep at which a share of the training schedule is done."""
        share = request.check_share(share, name)
        low, high = self.timestep_range
        if (low, high) == (0, self.num_train_timesteps - 1):
            return round(self.num_train_timesteps - share * self.num_train_timesteps)
        return high - share * (high - low)
