"""The base of the exponential integrators (DPM-Solver, DEIS, UniPC, SA-Solver): settings and the levels of a run.

On networks trained by flow matching (``use_flow_sigmas``) they integrate the same equation along straight lines, where
alpha is ``1 - sigma``; see :mod:`flow`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from diffuse_jax.allowed import Positive
from diffuse_jax.schedulers import flow
from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.schedulers.table import Evaluation, Grid

if TYPE_CHECKING:
    import jax

NEAR_ONE = 1 - 1e-6
"""Replaces flow level 1, pure noise, where lambda is infinite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExponentialIntegrator(Scheduler, abstract=True):
    """The settings and grid of all exponential integrators; subclasses add the update.

    Attributes:
      timestep_spacing: see :class:`Scheduler`; the step from the smallest timestep goes to the final level, which is
        left out of the spacing.
      thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding (Saharia et al. 2022).
      use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: spacings of sigmas instead of timesteps.
      use_flow_sigmas: levels of flow matching, for networks whose ``prediction_type`` is ``flow_prediction``. Explicit
        ``sigmas`` are then the levels before they are shifted, one per step, as flow-matching samplers take them.
      flow_shift: factor of the shift; classes with ``use_dynamic_shifting`` take it from ``plan(..., mu=)`` instead.
    """

    timestep_spacing: str = "linspace"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: Positive = 1.0

    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"prediction_type": (*ns.PREDICTION_TYPES, "flow_prediction")}
    karras_flow: ClassVar[bool] = False
    """Whether Karras sigmas can be read as ``sigma / alpha`` of flow levels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_flow(sg.sigma_spacing(self))
        if self.use_flow_sigmas:
            # Class attributes of all samplers, which this setting changes for one.
            object.__setattr__(self, "coordinates", "flow")
            object.__setattr__(self, "final_sigma_given", False)

    def _check_flow(self, spacing: str | None) -> None:
        name, predicted = self.class_name, self.prediction_type == "flow_prediction"
        if self.use_flow_sigmas and not predicted:
            raise ValueError(
                f"{name}: use_flow_sigmas=True is for networks that predict the flow, got prediction_type="
                f"{self.prediction_type!r}; set prediction_type='flow_prediction' or use_flow_sigmas=False"
            )
        if predicted and not self.use_flow_sigmas:
            raise ValueError(f"{name}: prediction_type='flow_prediction' needs use_flow_sigmas=True")
        for setting in ("use_dynamic_shifting", "shift_terminal"):
            value = getattr(self, setting, None)
            if value and not self.use_flow_sigmas:
                raise ValueError(
                    f"{name}: {setting}={value} is for flow levels; set use_flow_sigmas=True or leave it out"
                )
            if value and spacing:
                raise ValueError(
                    f"{name}: {setting}={value} has no use with {spacing}=True, which sets the levels itself"
                )
        if self.use_flow_sigmas and spacing and not (self.karras_flow and spacing == "use_karras_sigmas"):
            raise ValueError(f"{name}: use_flow_sigmas and {spacing} both choose the noise levels; set one of them")
        if self.use_flow_sigmas and spacing and self.flow_shift != 1:
            raise ValueError(f"{name}: flow_shift={self.flow_shift:g} has no use with {spacing}; set it to 1")

    @property
    def last_timesteps(self) -> int:
        """Training timesteps below this one are used: with ``lambda_min_clipped`` those of a larger lambda.

        The cosine schedule has nearly infinite noise at the timesteps that are then left out.
        """
        clipped = getattr(self, "lambda_min_clipped", -np.inf)
        return int(self.num_train_timesteps - np.searchsorted(-np.log(self.sigma_table[::-1]), clipped))

    @property
    def ends_clean(self) -> bool:
        """Whether the last step goes to sigma 0."""
        return getattr(self, "final_sigmas_type", "sigma_min") == "zero"

    def whole_timesteps(self, t: Array) -> Array:
        """Whole timesteps for the network from the fractional ones of a spacing of sigmas."""
        return np.round(t) if self.use_karras_sigmas else np.trunc(t)

    def grid(
        self,
        n: int,
        *,
        timesteps: Array | None,
        sigmas: Array | None,
        mu: float | None = None,
        as_published: bool = False,
    ) -> Grid:
        factor = flow.shift_factor(
            self.class_name,
            self.flow_shift,
            dynamic=getattr(self, "use_dynamic_shifting", False),
            kind=getattr(self, "time_shift_type", "exponential"),
            mu=mu,
        )
        if self.use_flow_sigmas:
            stays = "as_published" in self.grid_options and not as_published
            t, s = self._flow(n, timesteps, sigmas, factor, stays)
        else:
            t, s = self._spaced(n, timesteps, sigmas)
        levels = sg.with_alpha(s, self.coordinates)
        return Grid(t, levels[:-1], levels[1:])

    def _spaced(self, n: int, timesteps: Array | None, sigmas: Array | None) -> tuple[Array, Array]:
        """Timesteps and, one more, noise levels."""
        table, up = self.sigma_table, 1 if self.ascends else -1
        if sigmas is not None:
            sg.check_no_spacing(self, "sigmas")
            return ns.sigma_to_timestep(sigmas[:-1], table), sigmas
        if sg.sigma_spacing(self):
            if timesteps is not None:
                sg.check_no_spacing(self, "timesteps")
            # A spacing reaches both ends itself, so without a clean end the last of several steps stays where it is.
            s = sg.respaced(self, table[0], table[-1], max(n, 2))[::-up]
            t, s, last = self.whole_timesteps(ns.sigma_to_timestep(s[:n], table)), s[:n], s[-1]
        else:
            t = self.spaced_timesteps(n)[::up] if timesteps is None else timesteps
            s, last = sg.at_timesteps(table, t), table[self.last_timesteps - 1 if self.ascends else 0]
        return t, np.append(s, 0.0 if self.ends_clean else last)

    def spaced_timesteps(self, n: int) -> Array:
        """``n`` ascending timesteps of a spacing of one more, whose last point (the first, backwards) is left out."""
        last, train = self.last_timesteps, self.num_train_timesteps
        if self.timestep_spacing == "linspace":
            t = np.round(np.linspace(0, last - 1, n + 1))
        elif self.timestep_spacing == "leading":
            t = (np.arange(n + 1) * (last // (n + 1)) + self.steps_offset).astype(np.float64)
        else:
            t = np.round(np.arange(last, 0, -train / n))[:n][::-1] - 1
        t = t[:n] if self.ascends else t[-n:]
        if np.any(np.diff(t) <= 0) or t[-1] >= train or t[0] < 0:
            raise ValueError(
                f"{self.class_name} cannot place {n} steps on {last} timesteps with spacing"
                f" {self.timestep_spacing!r} and steps_offset={self.steps_offset}; use fewer steps"
            )
        return t

    def newest_output(self, e: Evaluation, *, data: bool) -> Array:
        """What is extrapolated: the clean sample, or the noise that goes with it where it is thresholded."""
        if data:
            return e.x0
        return e.eps_from_x0() if self.corrects_x0 else e.eps

    def flow_points(self, n: int) -> Array:
        """``n`` descending flow levels before they are shifted."""
        return np.asarray((1 - np.linspace(1, 1 / self.num_train_timesteps, n + 1))[:0:-1])

    def _flow(
        self, n: int, timesteps: Array | None, sigmas: Array | None, factor: float, stays: bool
    ) -> tuple[Array, Array]:
        """Timesteps and, one more, flow levels, shifted by ``factor``.

        The last level is 0, or that of the first training step if that is lower than the one before it, or, if the run
        ``stays``, the one before it.
        """
        train, up = self.num_train_timesteps, 1 if self.ascends else -1
        if timesteps is not None:
            raise ValueError(
                f"{self.class_name} with use_flow_sigmas=True tells the network sigma * {train}; give sigmas= instead"
                " of timesteps="
            )
        if sg.sigma_spacing(self):
            if sigmas is not None:
                sg.check_no_spacing(self, "sigmas")
            s = sg.respaced(self, self.sigma_table[0], self.sigma_table[-1], max(n, 2))
            s = s / (1 + s)
            s, low = s[:n], s[n - 1] if stays else s[-1]
        else:
            if sigmas is not None and not (sigmas.min() > 0 and sigmas.max() <= 1):
                raise ValueError(
                    "sigmas of a flow lie above 0 and up to 1, one per step (the level after the last one is added),"
                    f" got {sigmas[0]:g} ... {sigmas[-1]:g}"
                )
            s = flow.shift(self.flow_points(n) if sigmas is None else sigmas[::-up], factor)
            if getattr(self, "shift_terminal", None):
                s = flow.stretch_to_terminal(s, self.shift_terminal)  # type: ignore[attr-defined]
            low = s[-1] if stays else min(flow.shift(np.array(1 / train), factor), s[-1] / 2)
        path = np.minimum(np.append(s, 0.0 if self.ends_clean else low), NEAR_ONE)[::-up]
        return np.trunc(path[:-1] * train), path

    def train_levels(self) -> Array:
        return flow.training_levels(self.num_train_timesteps) if self.use_flow_sigmas else super().train_levels()

    def velocity(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """What the network should return: the flow ``noise - x0`` with flow sigmas, otherwise v."""
        return (noise - x0).astype(x0.dtype) if self.use_flow_sigmas else super().velocity(x0, noise, t)
