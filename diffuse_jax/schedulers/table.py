"""A sampler as a table: NumPy float64 coefficients that define what every model evaluation does to the sample.

Once the number of steps is known, a sampler is linear in a small stack of tensors::

    stack = (x, x0, output, memory[0], ..., memory[MEMORY - 1], noise)

``x0`` is the (possibly clipped) predicted clean sample, ``output`` is what the network returned. Each model
evaluation replaces ``x`` and the memory by linear combinations of the stack. A sampler writes its update once, as in
its paper, on the *unit vectors* of an :class:`Evaluation`; the vectors that come out are the rows of the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffuse_jax.schedulers.noise_schedule import Array, predict_eps, predict_x0

Level: TypeAlias = Sequence[float] | Array
"""An (alpha, sigma) pair."""

MEMORY = 5
"""Tensors that a sampler may remember from one evaluation to the next."""

WIDTH = 3 + MEMORY + 1
"""Length of the stack: x, x0, output, memory, noise."""


LEARNED_VARIANCES = ("", "learned", "learned_range")
"""What a network may return about the noise variance: nothing, the variance, or its place in a range of logarithms."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where a sampler evaluates the network.

    Attributes:
      timesteps: ``[n]``, passed to the network.
      source: ``[n, 2]``, (alpha, sigma) of the sample before each step, in the sampler's own coordinates.
      target: ``[n, 2]``, (alpha, sigma) after each step.
      init_scale: factor that turns Gaussian noise into the first sample.
      stride: training timesteps that every step goes back, where that is the same for all.
      final: (alpha, sigma) of what the run is taken to end at: a clean sample, even where the last step leaves a trace
        of noise, and noise for samplers that run backwards.
    """

    timesteps: Array
    source: Array
    target: Array
    init_scale: float = 1.0
    stride: int | None = None
    final: Level = (1.0, 0.0)


class Evaluation:
    """The unit vectors of one model evaluation at level ``(alpha, sigma)``; do arithmetic on them as on tensors.

    Attributes:
      x, output, noise: the sample, the raw network output, fresh Gaussian noise.
      x0: the predicted clean sample. With ``corrected`` (clipping or thresholding) it is a tensor of its own, otherwise
        it is the linear combination of ``x`` and ``output`` that it equals, which loses less to rounding.
      eps: the predicted noise, always from the raw output.
      memory: the remembered tensors.
      input_scale: what the sample is multiplied by before the network sees it; by default that gives it the spread that
        the network was trained on (variance 1 in preserving coordinates).
    """

    def __init__(
        self,
        timestep: float,
        level: Level,
        prediction_type: str,
        *,
        corrected: bool = False,
        sigma_data: float = 1.0,
        input_scale: float | None = None,
    ) -> None:
        self.timestep, self.prediction_type, self.sigma_data = float(timestep), prediction_type, sigma_data
        self.alpha, self.sigma = (float(v) for v in level)
        self.input_scale = float(
            1 / np.hypot(self.alpha * sigma_data, self.sigma) if input_scale is None else input_scale
        )
        if prediction_type == "epsilon" and self.alpha == 0:
            raise ValueError(
                f"timestep {timestep:g} is pure noise (zero terminal SNR), where a network that predicts epsilon says"
                " nothing about the image; use prediction_type 'v_prediction' or 'sample', or"
                " rescale_betas_zero_snr=False"
            )
        self.x, converted, self.output, *self.memory, self.noise = np.eye(WIDTH)
        self.x0 = converted if corrected else self.x0_of(self.x, self.output)
        self.eps = self.eps_of(self.x, self.output)

    def x0_of(self, x: Array, output: Array) -> Array:
        """What ``output`` means as a clean sample if the sample is ``x``."""
        return predict_x0(self.prediction_type, x, output, self.alpha, self.sigma, self.sigma_data)

    def eps_of(self, x: Array, output: Array) -> Array:
        """What ``output`` means as noise if the sample is ``x``."""
        return predict_eps(self.prediction_type, x, output, self.alpha, self.sigma, self.sigma_data)

    def eps_from_x0(self) -> Array:
        """The noise that goes with the (clipped) ``x0``."""
        return (self.x - self.alpha * self.x0) / self.sigma

    def row(
        self,
        sample: Array,
        memory: Sequence[Array] = (),
        log_variance: tuple[float, float] = (0.0, 0.0),
        interval: tuple[float, float] = (0.0, 0.0),
        inner: bool = False,
        known: Level | None = None,
    ) -> Row:
        """Finish the evaluation.

        Args:
          sample: the next sample.
          memory: the next memory; what is not given becomes zero.
          log_variance: range of a learned variance.
          interval: see :attr:`Table.interval`.
          inner: this evaluation does not finish its step.
          known: see :attr:`Table.known`; None is the level of the next evaluation.
        """
        rest = [np.zeros(WIDTH)] * (MEMORY - len(memory))
        return Row(self, np.stack([sample, *memory, *rest]), log_variance, interval, inner, known)


@dataclasses.dataclass(frozen=True)
class Row:
    """One finished evaluation: ``coefficients [1 + MEMORY, WIDTH]`` give the next sample and the next memory."""

    evaluation: Evaluation
    coefficients: Array
    log_variance: tuple[float, float] = (0.0, 0.0)
    interval: tuple[float, float] = (0.0, 0.0)
    inner: bool = False
    known: Level | None = None


def transfer(x: Array, eps: Array, source: Level, target: Level) -> Array:
    """Carry ``x`` from one noise level to another along constant ``eps`` (Song et al. 2020, eq. 12)."""
    (alpha, sigma), (alpha_next, sigma_next) = source, target
    return (alpha_next / alpha) * x + (sigma_next - alpha_next * sigma / alpha) * eps


@dataclasses.dataclass(frozen=True)
class Table:
    """A whole sampling run in float64; n is the number of model evaluations.

    Attributes:
      timesteps, input_scale: ``[n]``, the timestep passed to the network, and the factor on the sample that it sees.
      to_x0: ``[n, 2]``, ``x0 = to_x0[0] * x + to_x0[1] * output``.
      levels: ``[n + 1, 2]``, (alpha, sigma) of the sample at each evaluation; the last entry is after the run.
      known: ``[n + 1, 2]``, (alpha, sigma) to which a known image is noised before each evaluation: ``levels``, but
        where diffusers inpaints at other levels.
      rows: ``[n, 1 + MEMORY, WIDTH]``.
      log_variance: ``[n, 2]``, lower and upper logarithm of a learned variance (zero where none is learned).
      interval: ``[n, 2]``, the piece ``(a, b)`` of [0, 1] over which the noise is the increment of one Brownian path
        for the whole run, ``(W(b) - W(a)) / sqrt(b - a)``; an empty piece stands for noise independent of all other.
      inner: ``[n]``, whether more evaluations follow until the step is finished.
      init_scale: what noise is multiplied by to be the first sample.
      clip: limit of ``|x0|``, infinite for none.
      threshold: (ratio, largest value) of dynamic thresholding, or None.
      learned_variance: one of ``LEARNED_VARIANCES``: what the second half of twice the channels says, "" for nothing.
    """

    timesteps: Array
    input_scale: Array
    to_x0: Array
    levels: Array
    known: Array
    rows: Array
    log_variance: Array
    interval: Array
    inner: NDArray[np.bool_]
    init_scale: float = 1.0
    clip: float = np.inf
    threshold: tuple[float, float] | None = None
    learned_variance: str = ""

    @classmethod
    def build(
        cls,
        rows: Iterable[Row],
        init_scale: float,
        final: Level = (1.0, 0.0),
        clip: float = np.inf,
        threshold: tuple[float, float] | None = None,
        learned_variance: str = "",
    ) -> Table:
        """Collect the rows of a sampler; ``final`` is the level of the sample after the last one."""
        rows = list(rows)
        evaluations = [r.evaluation for r in rows]
        levels = np.array([(e.alpha, e.sigma) for e in evaluations] + [tuple(final)])
        known = levels.copy()
        for i, r in enumerate(rows, 1):
            known[i] = known[i] if r.known is None else r.known
        to_x0 = [e.x0_of(np.array([1.0, 0.0]), np.array([0.0, 1.0])) for e in evaluations]
        return cls(
            timesteps=np.array([e.timestep for e in evaluations]),
            input_scale=np.array([e.input_scale for e in evaluations]),
            to_x0=np.array(to_x0),
            levels=levels,
            known=known,
            rows=np.stack([r.coefficients for r in rows]),
            log_variance=np.array([r.log_variance for r in rows]),
            interval=np.array([r.interval for r in rows]),
            inner=np.array([r.inner for r in rows]),
            init_scale=float(init_scale),
            clip=clip,
            threshold=threshold,
            learned_variance=learned_variance,
        )

    def __len__(self) -> int:
        return len(self.timesteps)

    def cut(self, n: int) -> Table:
        """The first ``n`` evaluations (and those that finish a step): the run stops while there is still noise."""
        if not 1 <= n <= len(self):
            raise ValueError(f"cannot keep {n} of {len(self)} evaluations; keep between 1 and {len(self)}")
        n += int(np.argmin(self.inner[n - 1 :]))
        names = ("timesteps", "input_scale", "to_x0", "rows", "log_variance", "interval", "inner")
        # Like diffusers, a run that is cut ends with the known image clean: it goes on as the image of another run.
        known = np.array([*self.known[:n], (1.0, 0.0)])
        parts = {name: getattr(self, name)[:n] for name in names}
        return dataclasses.replace(self, levels=self.levels[: n + 1], known=known, **parts)

    def run(
        self, model: Callable[[Array, float], Array], sample: Array, noise: Sequence[Array] | None = None
    ) -> list[Array]:
        """Sample in NumPy: the slow, exact twin of the compiled loop, for tests and for looking at a sampler.

        Args:
          model: ``model(scaled_sample, timestep) -> output``.
          sample: the first sample in the sampler's coordinates, batch first.
          noise: one array per evaluation; needed only by stochastic samplers.

        Returns:
          The sample before every evaluation and after the last one, ``n + 1`` arrays.
        """
        memory = [np.zeros_like(sample)] * MEMORY
        trajectory = [sample]
        for i in range(len(self)):
            output = model(self.input_scale[i] * sample, self.timesteps[i])
            variance = np.zeros_like(sample)
            if self.learned_variance:
                output, variance = np.split(output, 2, axis=-1)
            x0 = self.correct(self.to_x0[i, 0] * sample + self.to_x0[i, 1] * output)
            z = np.zeros_like(sample) if noise is None else noise[i]
            if self.learned_variance == "learned":
                z = z * np.sqrt(np.maximum(variance, 0))
            low, high = self.log_variance[i]
            z = z * np.exp(0.5 * (low + 0.5 * (variance + 1) * (high - low)))
            stack = (sample, x0, output, *memory, z)
            sample, *memory = (
                sum((c * tensor for c, tensor in zip(row, stack, strict=True) if c != 0), np.zeros_like(sample))
                for row in self.rows[i]
            )
            trajectory.append(sample)
        return trajectory

    def correct(self, x0: Array) -> Array:
        """Clip or dynamically threshold (Saharia et al. 2022, section 2.3) a predicted clean sample."""
        if self.threshold is None:
            return np.clip(x0, -self.clip, self.clip)
        ratio, largest = self.threshold
        s = np.quantile(np.abs(x0).reshape(len(x0), -1), ratio, axis=1).clip(1, largest)
        s = s.reshape(-1, *[1] * (x0.ndim - 1))
        return np.clip(x0, -s, s) / s
