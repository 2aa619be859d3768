"""Where a run starts: from noise, or from an image with noise added."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffuse_jax.pipelines.method import Net, Params, Part, Rows
from diffuse_jax.pipelines.parts.guidance import per_image
from diffuse_jax.pipelines.parts.image import encode_image
from diffuse_jax.schedulers.plan import Plan, State


@dataclasses.dataclass(frozen=True)
class FromNoise(Part):
    """The sampler's first sample is scaled noise."""

    @property
    def reads(self) -> tuple[str, ...]:
        return ("noise",)

    def __call__(self, plan: Plan, rows: Rows) -> State:
        return plan.init(rows["noise"])


@dataclasses.dataclass(frozen=True)
class FromNoised(Part):
    """The first sample is ``image_latents`` noised to the plan's first level (Meng et al. 2021, SDEdit).

    Where ``pure_noise [B]`` is true, it is noise alone.
    """

    @property
    def reads(self) -> tuple[str, ...]:
        return "noise", "image_latents"

    def __call__(self, plan: Plan, rows: Rows) -> State:
        state = plan.init(rows["noise"], rows["image_latents"])
        if "pure_noise" not in rows:
            return state
        noise = plan.init(rows["noise"]).sample
        return state._replace(sample=jnp.where(per_image(rows["pure_noise"], noise), noise, state.sample))


@dataclasses.dataclass(frozen=True)
class FromMixture(Part):
    """The first sample is ``image_latents`` and noise in the proportions ``mixture [B,2]``, whatever the plan's level.

    That is what the network sees; a sampler that scales its input starts from as much more.
    """

    @property
    def reads(self) -> tuple[str, ...]:
        return "noise", "image_latents", "mixture"

    def __call__(self, plan: Plan, rows: Rows) -> State:
        image, noise = rows["image_latents"], rows["noise"]
        of_image, of_noise = (per_image(rows["mixture"][:, k], noise) for k in range(2))
        return plan.resume((of_image * image + of_noise * noise) / jnp.asarray(plan.input_scale)[0])


@dataclasses.dataclass(frozen=True)
class FromImage(FromNoised):
    """The same from an image: ``image [B,H,W,3]`` in [-1, 1], or ``image_latents`` if it is already encoded."""

    vae: Net

    @property
    def reads(self) -> tuple[str, ...]:
        return "noise", "image|image_latents"

    @property
    def adds(self) -> tuple[str, ...]:
        return ("image_latents",)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        if "image_latents" in rows:
            return rows
        return rows | {"image_latents": encode_image(self.vae, params, rows["image"], keys, "image", rows)}


@dataclasses.dataclass(frozen=True)
class FromPixels(Part):
    """The first sample is ``clean_image [B,H,W,C]`` in [-1, 1], noised to the plan's first level.

    Where ``clean_mask [B,H,W,1]`` is 0, if there is one, it is the image without noise.
    """

    @property
    def reads(self) -> tuple[str, ...]:
        return "noise", "clean_image"

    def __call__(self, plan: Plan, rows: Rows) -> State:
        state, image = plan.init(rows["noise"], rows["clean_image"]), rows["clean_image"]
        if "clean_mask" not in rows:
            return state
        return state._replace(sample=jnp.where(rows["clean_mask"] > 0, state.sample, image))


@dataclasses.dataclass(frozen=True)
class FromCleanImage(FromImage):
    """The first sample is an image without noise, for samplers that run from an image to noise."""

    def __call__(self, plan: Plan, rows: Rows) -> State:
        return plan.resume(rows["image_latents"])


@dataclasses.dataclass(frozen=True)
class FromLatents(Part):
    """The first sample is ``latents [B, ...]``, the noisy result of another run (SDXL's refiner)."""

    @property
    def reads(self) -> tuple[str, ...]:
        return ("latents",)

    def __call__(self, plan: Plan, rows: Rows) -> State:
        return plan.resume(rows["latents"])
