"""The variance-exploding SDE, backwards: Song et al. 2021, 'Score-Based Generative Modeling through Stochastic
Differential Equations' (arXiv 2011.13456).

The predictor (alg. 2, reverse diffusion) is a table like that of other samplers. The corrector (alg. 4, annealed
Langevin dynamics) is not linear: its step size is a ratio of two norms. It is a separate function, which runs before
each predictor step::

    for i in range(n):
        for turn in range(scheduler.correct_steps):
            output = network(plan.model_input(state, i), plan.timestep(i))
            state = scheduler.correct(state, i, output, key, turn=turn)
        output = network(plan.model_input(state, i), plan.timestep(i))
        state = plan.step(state, i, output, key)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from diffuse_jax.allowed import Index, Positive
from diffuse_jax.schedulers.continuous import ContinuousScheduler
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.table import Evaluation, Grid, Level, Row

if TYPE_CHECKING:
    import jax

    from diffuse_jax.schedulers.plan import State


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreSdeVeScheduler(ContinuousScheduler):
    """Reverse diffusion between noise levels evenly spaced in the logarithm, for networks that return the score.

    Samples are ``x0 + sigma * eps``; the network sees them unscaled, conditioned on ``sigma``. A last step
    to a clean sample adds no noise.
    ``snr`` is the size of a corrector's step relative to its noise, ``correct_steps`` how many of them are made before
    each prediction; see the module and :meth:`correct`.
    """

    num_train_timesteps: int = 2000
    snr: float = 0.15
    sigma_min: Positive = 0.01
    sigma_max: Positive = 1348.0
    sampling_eps: float = 1e-5
    correct_steps: Index = 1

    coordinates: ClassVar[str] = "exploding"
    absent: ClassVar[tuple[str, ...]] = (*ContinuousScheduler.absent, "prediction_type")

    @property
    def timestep_range(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def level(self, t: Any, xp: Any = np) -> tuple[Any, Any]:
        return xp.ones_like(t), t

    def evaluation(self, timestep: float, level: Level) -> Evaluation:
        return Evaluation(timestep, level, "score", input_scale=1.0)

    def grid(self, n: int, *, timesteps: Array | None, sigmas: Array | None) -> Grid:
        if timesteps is not None:
            raise ValueError(f"{self.class_name} tells the network sigma; give sigmas= instead of timesteps=")
        if sigmas is None:
            sigmas = np.append(np.geomspace(self.sigma_max, self.sigma_min, n), 0.0)
            # The network gets the level at a time between 1 and sampling_eps, which hardly differs from the sample's.
            conditioning = self.sigma_min * (self.sigma_max / self.sigma_min) ** np.linspace(1, self.sampling_eps, n)
        else:
            conditioning = sigmas[:-1]
        levels = np.stack(self.level(sigmas), -1)
        return Grid(conditioning, levels[:-1], levels[1:], init_scale=sigmas[0])

    def evaluations(self, grid: Grid, begin: int) -> Iterator[Row]:
        for t, source, (_, sigma) in zip(grid.timesteps[begin:], grid.source[begin:], grid.target[begin:], strict=True):
            e = self.evaluation(t, source)
            variance = e.sigma**2 - sigma**2
            yield e.row(e.x + variance * e.output + (np.sqrt(variance) if sigma > 0 else 0.0) * e.noise)

    def correct(
        self,
        state: State,
        i: Any,
        score: jax.Array,
        key: jax.Array | None = None,
        *,
        turn: int = 0,
        noise: jax.Array | None = None,
    ) -> State:
        """One step of Langevin dynamics at the level of evaluation ``i`` (alg. 4); pure, to be compiled with the loop.

        The norms that set its length are those of each sample; in a batch they do not depend on the others.

        Args:
          state: the state before evaluation ``i``, or after the correction before this one.
          i: index of the evaluation that will follow.
          score: what the network returned for it, ``[B, ...]``.
          key: the key of the run, as for ``plan.step``: one, or one for each sample.
          turn: number of this correction, from 0.
          noise: use this ``[B, ...]`` instead of drawing from ``key``.
        """
        import jax
        import jax.numpy as jnp

        from diffuse_jax.schedulers.plan import check_key, draw_each, normal

        sample, score = state.sample, jnp.asarray(score, jnp.float32)
        if score.shape != sample.shape:
            raise ValueError(f"the network returned {score.shape} for a sample of {sample.shape}")
        if noise is None:

            def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
                return normal(jax.random.fold_in(key, turn), shape)  # not the noise of the step itself

            noise = draw_each(draw, check_key(key, sample.shape[0]), i, sample.shape)

        def norm(x: jax.Array) -> jax.Array:
            return jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim)), keepdims=True))

        length = 2 * (self.snr * norm(noise) / norm(score)) ** 2
        return state._replace(sample=sample + length * score + jnp.sqrt(2 * length) * noise)
