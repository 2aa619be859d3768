"""The mean and standard deviation of the CLIP image embeddings that stable unCLIP adds noise to."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffuse_jax.config import Config
from diffuse_jax.models.base import Model
from diffuse_jax.models.layers import parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableUnCLIPImageNormalizerConfig(Config):
    """``config.json`` of a ``StableUnCLIPImageNormalizer``."""

    class_name: ClassVar[str] = "StableUnCLIPImageNormalizer"

    embedding_dim: int = 768


class StableUnCLIPImageNormalizer(Model):
    """Scales CLIP image embeddings to zero mean and unit variance, the scale at which noise is added, and back."""

    config: StableUnCLIPImageNormalizerConfig = StableUnCLIPImageNormalizerConfig()
    config_class: ClassVar[type[Config]] = StableUnCLIPImageNormalizerConfig

    @classmethod
    def library(cls) -> str:
        """The module of PyTorch diffusers that published folders name for this class."""
        return "stable_diffusion"

    def setup(self) -> None:
        shape = (1, self.config.embedding_dim)
        self.mean = parameter(self, "mean", nn.initializers.zeros_init(), shape)
        self.std = parameter(self, "std", nn.initializers.ones_init(), shape)

    def example_inputs(self) -> dict[str, Any]:
        return {"embeddings": jax.ShapeDtypeStruct((1, self.config.embedding_dim), jnp.float32)}

    def __call__(self, embeddings: jax.Array) -> jax.Array:
        """Image embeddings ``[B,embedding_dim]`` at zero mean and unit variance, in float32."""
        mean, std = self.statistics()
        return (jnp.asarray(embeddings, jnp.float32) - mean) / std

    def unscale(self, embeddings: jax.Array) -> jax.Array:
        """The inverse: embeddings ``[B,embedding_dim]`` at the scale of CLIP, in float32."""
        mean, std = self.statistics()
        return jnp.asarray(embeddings, jnp.float32) * std + mean

    def statistics(self) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation, each ``[1,embedding_dim]`` in float32."""
        return jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
