"""Kandinsky 2.1, prior and decoder in one: images from prompts (Razzhigaev et al. 2023).

The arguments are those of 2.2. Both stages read the prompt, and the prior alone the negative one.
"""

from __future__ import annotations

from typing import ClassVar

from diffuse_jax.pipelines.combined import prefixed
from diffuse_jax.pipelines.kandinsky import KandinskyPipeline
from diffuse_jax.pipelines.kandinsky_img2img import KandinskyImg2ImgPipeline
from diffuse_jax.pipelines.kandinsky_inpaint import KandinskyInpaintPipeline
from diffuse_jax.pipelines.kandinsky_prior import KandinskyPriorPipeline
from diffuse_jax.pipelines.kandinsky_v22_combined import (
    KandinskyV22CombinedPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22InpaintCombinedPipeline,
)

COMPONENTS = (*KandinskyPipeline.required, *prefixed(KandinskyPriorPipeline.required))


class KandinskyCombinedPipeline(KandinskyV22CombinedPipeline):
    """Images from prompts: :attr:`prior_pipe` makes embeddings, :attr:`decoder_pipe` makes images of both."""

    required: ClassVar[tuple[str, ...]] = COMPONENTS
    prior = KandinskyPriorPipeline
    decoder = KandinskyPipeline


class KandinskyImg2ImgCombinedPipeline(KandinskyV22Img2ImgCombinedPipeline):
    """Images from prompts and an initial image."""

    required: ClassVar[tuple[str, ...]] = COMPONENTS
    prior = KandinskyPriorPipeline
    decoder = KandinskyImg2ImgPipeline


class KandinskyInpaintCombinedPipeline(KandinskyV22InpaintCombinedPipeline):
    """Repaints the masked part of an image from prompts."""

    required: ClassVar[tuple[str, ...]] = COMPONENTS
    prior = KandinskyPriorPipeline
    decoder = KandinskyInpaintPipeline
