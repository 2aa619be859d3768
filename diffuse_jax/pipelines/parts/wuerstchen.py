"""Würstchen's networks as parts: the prior, the decoder, and what is made of their samples (arXiv 2306.00637)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.pipelines.method import Net, Params, Part, Rows, Step
from diffuse_jax.pipelines.parts.decode import UnitPixels


@dataclasses.dataclass(frozen=True)
class SemanticPrior(Part):
    """A network that makes semantic maps from text; reads ``states [B,L,D]``."""

    net: Net

    @property
    def reads(self) -> tuple[str, ...]:
        return ("states",)

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        return self.net.apply(params, x, step.t, rows["states"])


@dataclasses.dataclass(frozen=True)
class SemanticDecoder(Part):
    """A network that makes latents from semantic maps ``effnet [B,k,l,c]`` and text, ``states [B,L,D]``."""

    net: Net

    @property
    def reads(self) -> tuple[str, ...]:
        return "effnet", "states"

    def __call__(self, params: Params, rows: Rows, x: jax.Array, step: Step) -> jax.Array:
        return self.net.apply(params, x, step.t, rows["effnet"], rows["states"])


@dataclasses.dataclass(frozen=True)
class SemanticMaps(Part):
    """The prior's samples as semantic maps: ``image_embeddings`` float32 ``[B,k,l,c]``, times ``mean`` less ``std``."""

    mean: float
    std: float

    def __call__(self, params: Params, rows: Rows, sample: jax.Array) -> dict[str, Any]:
        return {"image_embeddings": sample * self.mean - self.std}


@dataclasses.dataclass(frozen=True)
class UnitImages(Part):
    """Images from an autoencoder whose images are in [0, 1]: float32 ``[B,H,W,3]``, or with ``uint8`` from 0 to 255."""

    vqgan: Net
    uint8: bool = True

    def __call__(self, params: Params, rows: Rows, sample: jax.Array) -> dict[str, Any]:
        latents = sample.astype(jnp.float32) * self.vqgan.config.scale_factor
        return UnitPixels(self.uint8)(params, rows, self.vqgan.apply(params, latents, method="decode"))
