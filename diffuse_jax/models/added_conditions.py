"""Conditions of UNets beside the timestep: pooled prompts, image embeddings and hints.

DeepFloyd IF pools its prompt by attention; the decoders of Kandinsky 2.1 and 2.2 (Razzhigaev et al. 2023) take an
embedding of an image, both in the embedding of the timestep and as tokens to attend to.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffuse_jax.kernels import attention
from diffuse_jax.models.layers import Conv, Dense, LayerNorm, parameter

IMAGE_TOKENS = {"text_image_proj": 10, "image_proj": 32}
"""Kind of projection -> tokens of an image."""

HINT_WIDTHS = (16, 16, 32, 32, 96, 96, 256)
"""Widths of a hint's convolutions but the last; the third, the fifth and the seventh halve the resolution."""


class Layers(nn.Module):
    """Base of the modules below: their dtypes."""

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def dtypes(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class AttentionPool(Layers):
    """One vector from a sequence: its mean attends to it and to itself, ``[B,L,D] -> [B,D]`` (Radford et al. 2021)."""

    heads: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, _, D = x.shape
        position = parameter(self, "positional_embedding", nn.initializers.normal(D**-0.5), (1, D))
        mean = jnp.asarray(x, jnp.float32).mean(1, keepdims=True).astype(x.dtype)
        first = mean + jnp.asarray(position, x.dtype)[None]
        x = jnp.concatenate([first, x], 1)
        split = lambda source, name: Dense(D, **self.dtypes, name=name)(source).reshape(
            B, -1, self.heads, D // self.heads
        )
        return attention(split(first, "q_proj"), split(x, "k_proj"), split(x, "v_proj")).reshape(B, D)


class PooledText(Layers):
    """Prompt embeddings ``[B,L,D]`` as one vector ``[B,dim]``, between two norms."""

    dim: int = 1
    heads: int = 64

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        x = LayerNorm(**self.dtypes, name="norm1")(text)
        x = AttentionPool(heads=self.heads, **self.dtypes, name="pool")(x)
        return LayerNorm(**self.dtypes, name="norm2")(Dense(self.dim, **self.dtypes, name="proj")(x))


class TextAndImage(Layers):
    """The sum of a projected and normalised prompt ``[B,D]`` and a projected image ``[B,E]``: ``[B,dim]``."""

    dim: int = 1

    @nn.compact
    def __call__(self, text: jax.Array, image: jax.Array) -> jax.Array:
        dense = lambda x, name: Dense(self.dim, **self.dtypes, name=name)(x)
        return dense(image, "image_proj") + LayerNorm(**self.dtypes, name="text_norm")(dense(text, "text_proj"))


class ImageAndHint(Layers):
    """A projected and normalised image embedding, and features of an image to follow if ``channels`` is not 0.

    ``image [B,E]``, ``hint [B,8h,8w,3]`` -> ``[B,dim]`` and ``[B,h,w,channels]``, which is None without a hint.
    """

    dim: int = 1
    channels: int = 0

    @nn.compact
    def __call__(self, image: jax.Array, hint: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        image = LayerNorm(**self.dtypes, name="image_norm")(Dense(self.dim, **self.dtypes, name="image_proj")(image))
        if not self.channels or hint is None:
            return image, None
        for i, width in enumerate(HINT_WIDTHS):  # named by their places in a list of convolutions and activations
            stride = 2 if i and i % 2 == 0 else 1
            hint = nn.silu(Conv(width, stride=stride, **self.dtypes, name=f"input_hint_block_{2 * i}")(hint))
        last = f"input_hint_block_{2 * len(HINT_WIDTHS)}"
        return image, Conv(self.channels, **self.dtypes, name=last)(hint)


class ImageTokens(Layers):
    """Tokens of an image embedding ``[B,E]``: alone and normalised, or before those of a prompt ``[B,L,D]``.

    Returns ``[B,tokens,width]``, or ``[B,tokens+L,width]`` with a prompt.
    """

    tokens: int = 1
    width: int = 1

    @nn.compact
    def __call__(self, image: jax.Array, text: jax.Array | None = None) -> jax.Array:
        projected = Dense(self.tokens * self.width, **self.dtypes, name="image_embeds")(image)
        tokens = projected.reshape(len(image), self.tokens, self.width)
        if text is None:
            return LayerNorm(**self.dtypes, name="norm")(tokens)
        return jnp.concatenate([tokens, Dense(self.width, **self.dtypes, name="text_proj")(text)], 1)
