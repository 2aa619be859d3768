"""Vector quantisation: latents as entries of a learned codebook (van den Oord et al. 2017, 1711.00937)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.models.embeddings import Embedding


class Codebook(nn.Module):
    """``num`` vectors of length ``dim``, in float32 whatever ``dtype`` is."""

    num: int
    dim: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.embedding = Embedding(self.num, self.dim, dtype=jnp.float32, param_dtype=self.param_dtype)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """The vector nearest to each of the ``latents [...,dim]``, float32; its gradient passes to the latents."""
        z = latents.astype(jnp.float32)
        return z + jax.lax.stop_gradient(self.lookup(self.nearest(z)) - z)

    def nearest(self, latents: jax.Array) -> jax.Array:
        """Indices int32 ``[...]`` of the vectors nearest to ``latents [...,dim]``, by Euclidean distance."""
        vectors, z = self.lookup(jnp.arange(self.num)), latents.astype(jnp.float32)
        products = jnp.matmul(z, vectors.T, precision="highest")
        norms = jnp.square(vectors).sum(-1).reshape((1,) * (z.ndim - 1) + (-1,))
        return jnp.argmin(norms - 2 * products, -1).astype(jnp.int32)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """The vectors ``[...,dim]`` of ``indices [...]``, float32."""
        return self.embedding(indices)
