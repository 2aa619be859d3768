"""How a run advances, beyond the plain step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from diffuse_jax.pipelines.method import PLAIN_STEP, Params, Part, Rows, Step
from diffuse_jax.schedulers.plan import State


@dataclasses.dataclass(frozen=True)
class KeepKnown(Part):
    """After each step, what ``latent_mask`` leaves alone is the image again, at the noise level of the sample.

    Inpainting with any checkpoint; ``latent_mask [B,h,w,1]`` is 1 where to paint.
    """

    inner: Any = PLAIN_STEP

    @property
    def reads(self) -> tuple[str, ...]:
        return "latent_mask", "image_latents", "noise"

    def __call__(self, denoiser: Any, params: Params, rows: Rows, state: State, step: Step, keys: jax.Array) -> State:
        state = self.inner(denoiser, params, rows, state, step, keys)
        known = 1 - rows["latent_mask"]
        return step.plan.blend(state, step.i, rows["image_latents"], rows["noise"], known)
