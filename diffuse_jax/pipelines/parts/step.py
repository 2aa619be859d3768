"""Steps other than the plain one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.pipelines.method import PLAIN_STEP, Params, Part, Rows, Step
from diffuse_jax.schedulers.plan import State


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
