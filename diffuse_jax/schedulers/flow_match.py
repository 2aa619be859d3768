"""Samplers of flow matching networks: Esser et al. 2024 (arXiv 2403.03206) and, for the method, see :mod:`.flow`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from diffuse_jax.allowed import Range, Signed
from diffuse_jax.schedulers import flow
from diffuse_jax.schedulers import sigmas as sg
from diffuse_jax.schedulers.continuous import ContinuousScheduler
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Evaluation, Grid, Level, Row

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatchScheduler(ContinuousScheduler, abstract=True):
    """Levels between pure noise and a clean sample, for networks that predict the velocity ``eps - x0``.

    Samples are ``(1 - sigma) * x0 + sigma * eps``, the timestep is ``sigma * num_train_timesteps``. Explicit
    ``sigmas`` are one per step, before any shift; the run ends clean. Explicit timesteps are levels as they are.
    """

    prediction_type: str = "flow_prediction"
    shift: float = 1.0

    coordinates: ClassVar[str] = "flow"
    final_sigma_given: ClassVar[bool] = False
    absent: ClassVar[tuple[str, ...]] = (*ContinuousScheduler.absent, "prediction_type")
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"prediction_type": ("flow_prediction",)}

    @property
    def timestep_range(self) -> tuple[float, float]:
        return 0.0, float(self.num_train_timesteps)

    def level(self, t: Any, xp: Any = np) -> tuple[Any, Any]:
        return 1 - t / self.num_train_timesteps, t / self.num_train_timesteps

    def velocity(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """What the network should return, the same at all timesteps: ``noise - x0``."""
        del t
        return noise.astype(x0.dtype) - x0

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None, mu: float | None = None) -> Grid:
        train = self.num_train_timesteps
        if timesteps is not None:
            s = self._given(timesteps / train, mu)
        elif sigmas is not None:
            if sigmas[0] > 1 or sigmas[-1] <= 0:
                raise ValueError(f"sigmas must lie above 0 and up to 1, got {sigmas[0]:g} ... {sigmas[-1]:g}")
            s = self._shaped(sigmas, mu)
        else:
            # Published samplers shift the ends once for the range and then, with the rest, once more.
            last = float(flow.shift(np.array(1 / train), self._static_shift))
            s = self._shaped(np.linspace(1, last, n), mu)
        levels = sg.with_alpha(np.append(s, 0.0), self.coordinates)
        return Grid(s * train, levels[:-1], levels[1:])

    @property
    def _static_shift(self) -> float:
        return self.shift

    def _given(self, sigmas: Array, mu: float | None) -> Array:
        """Levels of explicit timesteps."""
        return sigmas

    def _shaped(self, sigmas: Array, mu: float | None) -> Array:
        """Levels of a run from evenly spaced or explicit ones."""
        return flow.shift(sigmas, flow.shift_factor(self.class_name, self.shift, dynamic=False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiftedFlowScheduler(FlowMatchScheduler, abstract=True):
    """All ways to space the levels.

    ``shift`` moves them to higher noise, or with ``use_dynamic_shifting`` ``mu`` does, an option of :meth:`plan` that
    :meth:`mu` gives. ``shift_terminal`` then stretches them to a last level, and one of the spacings of sigmas replaces
    those in between. With ``invert_sigmas`` the network's time runs in reverse: it is
    ``(1 - sigma) * num_train_timesteps``, and the network returns ``x0 - eps``.
    """

    use_dynamic_shifting: bool = False
    base_shift: Signed | None = 0.5
    max_shift: Signed | None = 1.15
    base_image_seq_len: Annotated[int, Range(1, 2**24)] = 256
    max_image_seq_len: Annotated[int, Range(1, 2**24)] = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    time_shift_type: str = "exponential"

    grid_options: ClassVar[tuple[str, ...]] = ("mu",)
    choices: ClassVar[dict[str, tuple[Any, ...]]] = FlowMatchScheduler.choices | {"time_shift_type": flow.SHIFT_TYPES}

    def __post_init__(self) -> None:
        super().__post_init__()
        sg.sigma_spacing(self)
        if self.shift_terminal is not None and not 0 <= self.shift_terminal < 1:
            raise ValueError(f"{self.class_name}: shift_terminal must lie from 0 to below 1, got {self.shift_terminal}")

    def mu(self, length: float) -> float:
        """``mu`` for an image of ``length`` tokens."""
        if self.base_shift is None or self.max_shift is None:
            raise ValueError(f"{self.class_name} has no base_shift or max_shift that mu could come from")
        return flow.mu_of_length(
            length,
            base_length=self.base_image_seq_len,
            max_length=self.max_image_seq_len,
            base_shift=self.base_shift,
            max_shift=self.max_shift,
        )

    @property
    def _static_shift(self) -> float:
        return 1.0 if self.use_dynamic_shifting else self.shift

    def _given(self, sigmas: Array, mu: float | None) -> Array:
        sg.check_no_spacing(self, "timesteps")
        if mu is not None:
            raise ValueError("explicit timesteps are levels that are not shifted; leave mu out or give sigmas=")
        return sigmas

    def _shaped(self, sigmas: Array, mu: float | None) -> Array:
        dynamic, kind = self.use_dynamic_shifting, self.time_shift_type
        s = flow.shift(sigmas, flow.shift_factor(self.class_name, self.shift, dynamic=dynamic, kind=kind, mu=mu))
        if self.shift_terminal:
            s = flow.stretch_to_terminal(s, self.shift_terminal)
        # Powers of 1 may come out a bit above it.
        return np.minimum(sg.respaced(self, s[-1], s[0], len(s)), 1.0) if sg.sigma_spacing(self) else s

    def level(self, t: Any, xp: Any = np) -> tuple[Any, Any]:
        alpha, sigma = super().level(t, xp)
        return (sigma, alpha) if self.invert_sigmas else (alpha, sigma)

    def velocity(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        velocity = super().velocity(x0, noise, t)
        return -velocity if self.invert_sigmas else velocity

    def evaluation(self, timestep: float, level: Level) -> Evaluation:
        if not self.invert_sigmas:
            return super().evaluation(timestep, level)
        return Evaluation(self.num_train_timesteps - timestep, level, "negative_flow", input_scale=1.0)

    def _cutoff(self, name: str, share: float) -> float:
        if self.invert_sigmas:
            raise ValueError(f"{self.class_name} with invert_sigmas=True is run as a whole, without {name}=")
        return super()._cutoff(name, share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatchEulerDiscreteScheduler(ShiftedFlowScheduler):
    """Euler steps (SD 3, Flux); with ``stochastic_sampling`` jumps to the clean sample, noised to the next level."""

    stochastic_sampling: bool = False

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        for t, source, target in zip(grid.timesteps[begin:], grid.source[begin:], grid.target[begin:], strict=True):
            e, (alpha, sigma) = self.evaluation(t, source), target
            if self.stochastic_sampling:
                yield e.row(alpha * e.x0 + sigma * e.noise)
            else:
                yield e.row(e.x + (sigma - e.sigma) * (e.eps - e.x0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatchLCMScheduler(ShiftedFlowScheduler):
    """Few-step sampling of distilled networks: jump to the clean sample, then noise it to the next level.

    ``scale_factors``, which make the sample grow between steps, are read and kept, but such a run is not a table.
    """

    scale_factors: tuple[float, ...] | None = None
    upscale_mode: str = "bicubic"

    harmless: ClassVar[Mapping[str, str]] = {"upscale_mode": "of scale_factors, with which there are no plans"}

    choices: ClassVar[dict[str, tuple[Any, ...]]] = ShiftedFlowScheduler.choices | {
        "upscale_mode": ("nearest", "linear", "bilinear", "bicubic", "trilinear", "area", "nearest-exact")
    }

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None, mu: float | None = None) -> Grid:
        if self.scale_factors:
            raise ValueError(
                f"{self.class_name} with scale_factors={list(self.scale_factors)} changes the size of the sample on the"
                " way, which a plan cannot; use .replace(scale_factors=None) and one plan for each size"
            )
        return super().grid(n, timesteps=timesteps, sigmas=sigmas, mu=mu)

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        for t, source, target in zip(grid.timesteps[begin:], grid.source[begin:], grid.target[begin:], strict=True):
            e, (alpha, sigma) = self.evaluation(t, source), target
            yield e.row(alpha * e.x0 + sigma * e.noise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatchHeunDiscreteScheduler(FlowMatchScheduler):
    """Heun steps: two evaluations each, but one for the last."""

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        for i in range(begin, len(grid.timesteps)):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            h, velocity = grid.target[i, 1] - e.sigma, e.eps - e.x0
            ends = i + 1 == len(grid.timesteps)
            yield e.row(e.x + h * velocity, memory=[e.x, velocity], inner=not ends)
            if ends:
                return
            e = self.evaluation(grid.timesteps[i + 1], grid.target[i])
            start, first = e.memory[:2]
            yield e.row(start + h * (first + e.eps - e.x0) / 2)
