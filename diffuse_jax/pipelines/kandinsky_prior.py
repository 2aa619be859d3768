"""The prior of Kandinsky 2.1: from a prompt to the embedding of an image (Razzhigaev et al. 2023)."""

from __future__ import annotations

from diffuse_jax.pipelines.families.prior import KANDINSKY21_PRIOR
from diffuse_jax.pipelines.kandinsky_v22_prior import KandinskyV22PriorPipeline


class KandinskyPriorPipeline(KandinskyV22PriorPipeline):
    """Embeddings of images for the decoders of Kandinsky 2.1, made as by :class:`KandinskyV22PriorPipeline`."""

    family = KANDINSKY21_PRIOR
