"""When guidance acts, how its branches are combined, and further branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffuse_jax.pipelines.family import Call
from diffuse_jax.pipelines.inputs import ImageInput, mask_pixels, one_per_image
from diffuse_jax.pipelines.modifiers.request import (
    Number,
    changed,
    combined,
    more_negatives,
    numbers,
    require_guidance,
    with_branches,
)
from diffuse_jax.pipelines.parts import combine
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.tasks import vae_of


@dataclasses.dataclass(frozen=True)
class GuidanceInterval:
    """Guidance only between two fractions of the run (Kynkäänniemi et al. 2024, arXiv 2404.07724); outside of it the
    conditional prediction is used.

    Attributes:
      start, stop: in [0, 1]; evaluations from ``int(start * n)`` to before ``int(stop * n)`` of ``n`` are guided.
    """

    start: float = 0.0
    stop: float = 1.0

    def __call__(self, request: Request, pipe: Any) -> Request:
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(f"the interval must be 0 <= start < stop <= 1, got start={self.start}, stop={self.stop}")
        require_guidance(request, self)
        scales, n = schedule_of(request), int(request.plan.num_evaluations)
        step = np.arange(scales.shape[1])
        inside = (int(self.start * n) <= step) & (step < int(self.stop * n))
        return changed(request, {"guidance_schedule": np.where(inside, scales, 1.0).astype(np.float32)})


@dataclasses.dataclass(frozen=True)
class GuidanceSchedule:
    """A guidance scale for each evaluation, in place of the call's.

    Attributes:
      scales: one for each evaluation of the network; or a function of the share of the run, from 0 at the first
        evaluation to 1 at the last.
    """

    scales: Sequence[float] | Callable[[float], float]

    def __call__(self, request: Request, pipe: Any) -> Request:
        require_guidance(request, self)
        n = int(request.plan.num_evaluations)
        given = self.scales
        values = [given(i / max(n - 1, 1)) for i in range(n)] if callable(given) else [*given]
        if len(values) != n or not np.isfinite(values).all():
            raise ValueError(f"give a finite guidance scale for each of {n} evaluations, got {len(values)}: {values}")
        scales = np.ones_like(schedule_of(request))
        scales[:, :n] = values
        return changed(request, {"guidance_schedule": scales})


def schedule_of(request: Request) -> np.ndarray:
    """The guidance scale of each image at each evaluation, as long as the plan's arrays: ``[B, N]``."""
    if "guidance_schedule" in request.rows:
        return np.asarray(request.rows["guidance_schedule"])
    scale = np.asarray(request.rows["guidance_scale"], np.float32)
    return np.tile(scale[:, None], (1, len(request.plan.timesteps)))


@dataclasses.dataclass(frozen=True)
class AdaptiveProjected:
    """Adaptive projected guidance; see :class:`~diffuse_jax.pipelines.parts.combine.AdaptiveProjected`.

    Attributes:
      momentum: of the difference of the branches; the paper's are negative, -0.5 for Stable Diffusion.
      norm_threshold: the largest norm of the difference; 0 is any.
      eta: weight of its share parallel to the conditional prediction.
    """

    momentum: Number = -0.5
    norm_threshold: Number = 15.0
    eta: Number = 0.0

    def __call__(self, request: Request, pipe: Any) -> Request:
        require_guidance(request, self)
        rows = {"apg": numbers(request, self.momentum, self.norm_threshold, self.eta, name="AdaptiveProjected")}
        return combined(request, rows, combine.AdaptiveProjected())


@dataclasses.dataclass(frozen=True)
class ZeroStar:
    """CFG-Zero*; see :class:`~diffuse_jax.pipelines.parts.combine.ZeroStar`.

    Attributes:
      zero_steps: how many evaluations predict zero; meant for flow matching, 0 for others.
    """

    zero_steps: int = 1

    def __call__(self, request: Request, pipe: Any) -> Request:
        require_guidance(request, self)
        rows = {"zero_steps": np.full(request.images, self.zero_steps, np.int32)}
        return combined(request, rows, combine.ZeroStar())


@dataclasses.dataclass(frozen=True)
class PerpNeg:
    """Perp-Neg; see :class:`~diffuse_jax.pipelines.parts.combine.PerpNeg`. The call's ``negative_prompt`` is what the
    image should not show; the empty prompt becomes a branch of its own.

    Attributes:
      weight: of the negative prompt.
    """

    weight: Number = 1.0

    def __call__(self, request: Request, pipe: Any) -> Request:
        require_guidance(request, self)
        rows = with_branches(request, pipe, [""], first=True)
        if "embeds_mask" in rows:
            rows["embeds_mask"].values[:, 0] = not pipe.family.zero_negative(pipe, Call({}, 1, 1, (0, 0)))
        rows["perp_weight"] = one_per_image(self.weight, request.images, "PerpNeg")
        return combined(more_negatives(request, 2), rows, combine.PerpNeg())


@dataclasses.dataclass(frozen=True)
class Regions:
    """Further prompts, each where a mask is white; the call's own prompt counts where no mask is.

    Attributes:
      prompts: one for each region.
      masks: one for each region, of the image's size; PIL images are resized. As ``mask_image`` of inpainting.
    """

    prompts: Sequence[str]
    masks: Sequence[ImageInput]

    def __call__(self, request: Request, pipe: Any) -> Request:
        require_guidance(request, self)
        if isinstance(self.prompts, str) or len(self.prompts) != len(self.masks) or not self.prompts:
            raise ValueError(f"give a mask for each of {len(self.prompts)} prompts, got {len(self.masks)} masks")
        scale = vae_of(pipe).config.scale
        height, width = (scale * length for length in request.method.latent_shape[:2])
        masks = [mask_pixels(mask, (height, width), "masks")[0, ::scale, ::scale] for mask in self.masks]
        rest = np.clip(1 - np.sum(masks, 0), 0, 1)
        together = np.concatenate([rest, *masks], -1)
        rows = with_branches(request, pipe, self.prompts)
        rows["region_masks"] = np.tile(together, (request.images, 1, 1, 1))
        return combined(request, rows, combine.Regions())
