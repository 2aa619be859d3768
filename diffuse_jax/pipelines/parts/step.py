"""Steps other than the plain one."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from diffuse_jax.pipelines.method import PLAIN_STEP, Params, Part, Rows, Step, keys_for
from diffuse_jax.schedulers import ScoreSdeVeScheduler
from diffuse_jax.schedulers.plan import State, draw_each
from diffuse_jax.schedulers.plan import normal as normal_noise


@dataclasses.dataclass(frozen=True)
class KeepKnown(Part):
    """Inpainting with any checkpoint: each step ends by restoring the known region, noised to the sample's level.

    ``latent_mask [B,h,w,1]`` is 1 in the region to repaint.
    """

    inner: Any = PLAIN_STEP

    @property
    def reads(self) -> tuple[str, ...]:
        return "latent_mask", "image_latents", "noise"

    def __call__(self, denoiser: Any, params: Params, rows: Rows, state: State, step: Step, keys: jax.Array) -> State:
        state = self.inner(denoiser, params, rows, state, step, keys)
        known = 1 - rows["latent_mask"]
        return step.plan.blend(state, step.i, rows["image_latents"], rows["noise"], known)


@dataclasses.dataclass(frozen=True)
class KeepClean(Part):
    """Inpainting in pixel space: each step ends by restoring the known region, without noise.

    ``clean_mask [B,H,W,1]`` is 1 in the region to repaint.
    """

    inner: Any = PLAIN_STEP

    @property
    def reads(self) -> tuple[str, ...]:
        return "clean_mask", "clean_image"

    def __call__(self, denoiser: Any, params: Params, rows: Rows, state: State, step: Step, keys: jax.Array) -> State:
        state = self.inner(denoiser, params, rows, state, step, keys)
        return state._replace(sample=jnp.where(rows["clean_mask"] > 0, state.sample, rows["clean_image"]))


@dataclasses.dataclass(frozen=True)
class KeepKnownAnew(KeepKnown):
    """RePaint (Lugmayr et al. 2022, arXiv 2201.09865): :class:`KeepKnown` with new noise in each evaluation."""

    draws: ClassVar[bool] = True

    def __call__(self, denoiser: Any, params: Params, rows: Rows, state: State, step: Step, keys: jax.Array) -> State:
        noise = draw_each(normal_noise, keys_for(keys, "known"), step.i, state.sample.shape)
        return super().__call__(denoiser, params, rows | {"noise": noise}, state, step, keys)


@dataclasses.dataclass(frozen=True)
class Langevin(Part):
    """Predictor and corrector (Song et al. 2021, arXiv 2011.13456): the sampler's corrections, then its step.

    Every correction evaluates the network once.
    """

    scheduler: ScoreSdeVeScheduler
    inner: Any = PLAIN_STEP

    draws: ClassVar[bool] = True

    def __call__(self, denoiser: Any, params: Params, rows: Rows, state: State, step: Step, keys: jax.Array) -> State:
        for turn in range(self.scheduler.correct_steps):
            score = denoiser(params, rows, step.plan.model_input(state, step.i), step)
            state = self.scheduler.correct(state, step.i, score, keys, turn=turn)
        return self.inner(denoiser, params, rows, state, step, keys)


@dataclasses.dataclass(frozen=True)
class KeepInverted(Part):
    """DiffEdit (Couairon et al. 2022, arXiv 2210.11427): each step ends by restoring, outside the mask, what inversion
    found there.

    ``latent_mask [B,h,w,1]`` is 1 in the region to repaint; ``inverted [B,N,h,w,c]`` has the samples of the inversion,
    the noisiest first, and evaluation ``i`` restores that of index ``i``.
    """

    inner: Any = PLAIN_STEP

    @property
    def reads(self) -> tuple[str, ...]:
        return "latent_mask", "inverted"

    def __call__(self, denoiser: Any, params: Params, rows: Rows, state: State, step: Step, keys: jax.Array) -> State:
        state = self.inner(denoiser, params, rows, state, step, keys)
        mask, known = rows["latent_mask"], rows["inverted"][:, step.i]
        return state._replace(sample=mask * state.sample + (1 - mask) * known)


@dataclasses.dataclass(frozen=True)
class Predict(Part):
    """No step: the prediction itself takes the sample's place, for runs of one evaluation."""

    def __call__(self, denoiser: Any, params: Params, rows: Rows, state: State, step: Step, keys: jax.Array) -> State:
        output = denoiser(params, rows, step.plan.model_input(state, step.i), step)
        return state._replace(sample=output[..., : state.sample.shape[-1]].astype(jnp.float32))
