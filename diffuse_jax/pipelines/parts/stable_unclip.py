"""The condition of stable unCLIP: an image embedding with noise added, and how much of it (Ramesh et al. 2022)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffuse_jax.models.embeddings import sinusoidal_embedding
from diffuse_jax.pipelines.method import Net, Params, Part, Rows, draw, noise_row
from diffuse_jax.pipelines.parts.ip_adapter import for_branches
from diffuse_jax.schedulers.noising import noised


@dataclasses.dataclass(frozen=True)
class NoisedEmbedding(Part):
    """``class_labels [B,2E]``: noised embeddings, and the sinusoidal embedding of the noise level; zeros in the branch
    without them.

    Reads ``image_embeds [B,E]``; ``noise_level [B]``, a training step, and ``image_embedding_level [B,2]``, its (alpha,
    sigma) for embeddings of unit variance; and ``prompted``, bool ``[B]`` or :class:`Branches
    <diffuse_jax.pipelines.parts.Branches>` of it.
    """

    normalizer: Net
    purpose = "image embedding"

    @property
    def reads(self) -> tuple[str, ...]:
        return "image_embeds", "noise_level", "image_embedding_level", "prompted"

    @property
    def adds(self) -> tuple[str, ...]:
        return ("class_labels",)

    @property
    def shape(self) -> tuple[int]:
        """The shape of one embedding."""
        return (self.normalizer.config.embedding_dim,)

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        given = rows.get(noise_row(self.purpose))
        noise = draw(keys, self.purpose, self.shape) if given is None else given
        scaled = noised(rows["image_embedding_level"], self.normalizer.apply(params, rows["image_embeds"]), noise)
        embedding = self.normalizer.apply(params, scaled, method="unscale")
        labels = jnp.concatenate([embedding, sinusoidal_embedding(rows["noise_level"], *self.shape)], -1)
        return rows | {"class_labels": for_branches(labels, jnp.zeros_like(labels[:1]), rows["prompted"])}
