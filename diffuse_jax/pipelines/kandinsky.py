"""Kandinsky 2.1: images from image embeddings and prompts (Razzhigaev et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.families.kandinsky import KANDINSKY
from diffuse_jax.pipelines.inputs import Prompt
from diffuse_jax.pipelines.kandinsky_decoding import decoder_request
from diffuse_jax.pipelines.options import PromptedEmbeddingOptions
from diffuse_jax.pipelines.pipeline import DiffusionPipeline
from diffuse_jax.pipelines.running import Request


class KandinskyPipeline(DiffusionPipeline):
    """Images from prompts and the embeddings that the prior makes of them."""

    required: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "unet", "scheduler", "movq")
    masked: ClassVar[bool] = False
    added: ClassVar[str] = "text_image"
    family = KANDINSKY

    def compose(
        self,
        prompt: Prompt | None = None,
        image_embeds: Any = None,
        negative_image_embeds: Any = None,
        *,
        height: int = 512,
        width: int = 512,
        guidance_scale: float | Sequence[float] = 4.0,
        **options: Unpack[PromptedEmbeddingOptions],
    ) -> Request:
        """Generate images, in 100 steps by default. Arguments shared with :class:`KandinskyV22Pipeline` have the same
        meaning.

        Args:
          prompt: one for all embeddings, or a list; each is for as many consecutive embeddings.
          image_embeds: ``[N,E]``, from the prior.
          negative_image_embeds: ``[N,E]``, from the prior; needed if a scale is above 1.
          height, width: in pixels, rounded up to a multiple of 64.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.PromptedEmbeddingOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        named = {"prompt": prompt, "image_embeds": image_embeds, "negative_image_embeds": negative_image_embeds}
        return decoder_request(self, {**named, "guidance_scale": guidance_scale}, options, height, width)
