"""Ways to combine the branches of guidance beside the linear one, for ``ClassifierFree.combine``."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffuse_jax.pipelines.method import Rows, Step
from diffuse_jax.pipelines.parts.guidance import Linear, guidance_scale, per_image


@dataclasses.dataclass(frozen=True)
class AdaptiveProjected(Linear):
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416, algorithm 1).

    The difference of the branches gets momentum and at most a norm, and the share of it that is parallel to the
    conditional prediction, which saturates images, is weighted down. Reads ``apg [B, 3]``: the momentum, the largest
    norm (0: any), and the weight of the parallel share.
    """

    @property
    def reads(self) -> tuple[str, ...]:
        return ("apg",)

    @property
    def keeps(self) -> bool:
        return True

    def __call__(self, rows: Rows, step: Step, output: jax.Array) -> jax.Array:
        negative, positive = output
        momentum, largest, weight = (per_image(value, positive) for value in rows["apg"].T)
        update = positive - negative + momentum * step.kept.read("apg", positive)
        step.kept.write("apg", update)
        norm = jnp.sqrt(inner_product(update, update))
        update = update * jnp.where((largest > 0) & (norm > largest), largest / norm, 1.0)
        direction = positive / jnp.maximum(jnp.sqrt(inner_product(positive, positive)), 1e-12)
        parallel = inner_product(update, direction) * direction
        update = update - parallel + weight * parallel
        return negative + per_image(guidance_scale(rows, step), positive) * update


@dataclasses.dataclass(frozen=True)
class ZeroStar(Linear):
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): the unconditional prediction is scaled to fit the conditional one,
    and the first evaluations predict zero. Reads ``zero_steps int32 [B]``, the number of these."""

    @property
    def reads(self) -> tuple[str, ...]:
        return ("zero_steps",)

    def __call__(self, rows: Rows, step: Step, output: jax.Array) -> jax.Array:
        negative, positive = output
        negative = negative * inner_product(positive, negative) / (inner_product(negative, negative) + 1e-8)
        guided = super().__call__(rows, step, jnp.stack([negative, positive]))
        return jnp.where(step.i < per_image(rows["zero_steps"], positive), 0.0, guided)


@dataclasses.dataclass(frozen=True)
class PerpNeg(Linear):
    """Perp-Neg (Armandpour et al. 2023, arXiv 2304.04968): only what is perpendicular to the prompt's direction counts
    of the negative prompt's. Three branches: the empty prompt, the negative prompt, the prompt. Reads
    ``perp_weight [B]``, the weight of the negative prompt."""

    unconditional: ClassVar[int] = 2

    @property
    def reads(self) -> tuple[str, ...]:
        return ("perp_weight",)

    def __call__(self, rows: Rows, step: Step, output: jax.Array) -> jax.Array:
        empty, negative, positive = output
        wanted, unwanted = positive - empty, negative - empty
        along = inner_product(unwanted, wanted) / jnp.maximum(inner_product(wanted, wanted), 1e-12)
        unwanted = per_image(rows["perp_weight"], wanted) * (unwanted - along * wanted)
        return empty + per_image(guidance_scale(rows, step), wanted) * (wanted - unwanted)


@dataclasses.dataclass(frozen=True)
class Regions(Linear):
    """A prompt for each region (Bar-Tal et al. 2023, arXiv 2302.08113, section 4.2): the conditional prediction is the
    mean of theirs, weighted by masks. Branches: the negative prompt, then one for each region. Reads
    ``region_masks [B,h,w,R]``, of which at least one is positive at every pixel."""

    @property
    def reads(self) -> tuple[str, ...]:
        return ("region_masks",)

    def positive(self, rows: Rows, output: jax.Array) -> jax.Array:
        masks = jnp.moveaxis(rows["region_masks"], -1, 0)[..., None]
        return (output[-len(masks) :] * masks).sum(0) / masks.sum(0)

    def __call__(self, rows: Rows, step: Step, output: jax.Array) -> jax.Array:
        return super().__call__(rows, step, jnp.stack([output[0], self.positive(rows, output)]))


@dataclasses.dataclass(frozen=True)
class TwoScales(Linear):
    """A scale for the prompt and one for the image (Brooks et al. 2023, arXiv 2211.09800, equation 3). Branches:
    neither, the image alone, both. Reads ``image_guidance_scale [B]``."""

    unconditional: ClassVar[int] = 2

    @property
    def reads(self) -> tuple[str, ...]:
        return ("image_guidance_scale",)

    def __call__(self, rows: Rows, step: Step, output: jax.Array) -> jax.Array:
        neither, image, both = output
        along_image = per_image(rows["image_guidance_scale"], both) * (image - neither)
        return neither + along_image + per_image(guidance_scale(rows, step), both) * (both - image)


@dataclasses.dataclass(frozen=True)
class Between(Linear):
    """The difference of two guided predictions, the second minus the first (DiffEdit's mask). Branches: those of the
    first, then those of the second, each a conditional one, with an unconditional one before it or without."""

    def __call__(self, rows: Rows, step: Step, output: jax.Array) -> jax.Array:
        half = len(output) // 2
        guided = lambda y: super(Between, self).__call__(rows, step, y) if half > 1 else y[0]
        return guided(output[half:]) - guided(output[:half])


def inner_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Of each image of ``x`` with that of ``y``, ``[B, 1, ...]``."""
    return (x * y).sum(tuple(range(1, x.ndim)), keepdims=True)
