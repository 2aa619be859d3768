"""Steps other than the plain one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

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
