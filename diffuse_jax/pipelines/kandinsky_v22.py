"""Kandinsky 2.2: images from image embeddings (Razzhigaev et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.families.kandinsky_v22 import KANDINSKY_V22
from diffuse_jax.pipelines.kandinsky_decoding import decoder_request
from diffuse_jax.pipelines.options import EmbeddingOptions
from diffuse_jax.pipelines.pipeline import DiffusionPipeline
from diffuse_jax.pipelines.running import Request


class KandinskyV22Pipeline(DiffusionPipeline):
    """Images from the embeddings that the prior makes of prompts. There is no text encoder."""

    required: ClassVar[tuple[str, ...]] = ("unet", "scheduler", "movq")
    masked: ClassVar[bool] = False
    added: ClassVar[str] = "image"
    """What the UNet embeds beside the timestep (``addition_embed_type``)."""
    family = KANDINSKY_V22

    def compose(
        self,
        image_embeds: Any = None,
        negative_image_embeds: Any = None,
        *,
        height: int = 512,
        width: int = 512,
        guidance_scale: float | Sequence[float] = 4.0,
        **options: Unpack[EmbeddingOptions],
    ) -> Request:
        """Generate images, in 100 steps by default. Arguments shared with :class:`StableDiffusionPipeline` have the
        same meaning.

        Args:
          image_embeds: ``[N,E]``, from the prior.
          negative_image_embeds: ``[N,E]``, from the prior; needed if a scale is above 1.
          height, width: in pixels, rounded up to a multiple of 64.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.EmbeddingOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        embeds = {"image_embeds": image_embeds, "negative_image_embeds": negative_image_embeds}
        return decoder_request(self, {**embeds, "guidance_scale": guidance_scale}, options, height, width)
