"""Kandinsky 2.1: inpainting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.kandinsky import KandinskyPipeline
from diffuse_jax.pipelines.kandinsky_decoding import decoder_request, repainted
from diffuse_jax.pipelines.options import PromptedEmbeddingOptions
from diffuse_jax.pipelines.running import Request


class KandinskyInpaintPipeline(KandinskyPipeline):
    """Repaints the masked part of an image from prompts and embeddings."""

    masked: ClassVar[bool] = True

    def compose(  # type: ignore[override]
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        mask_image: ImageInput = None,
        image_embeds: Any = None,
        negative_image_embeds: Any = None,
        *,
        height: int = 512,
        width: int = 512,
        guidance_scale: float | Sequence[float] = 4.0,
        **options: Unpack[PromptedEmbeddingOptions],
    ) -> Request:
        """Generate images. Arguments shared with :class:`KandinskyPipeline` have the same meaning.

        Args:
          prompt: one for all embeddings, or a list; each is for as many consecutive embeddings.
          image: the initial image, or one per embedding; or latents ``[B,h,w,c]``. It is resized to the output's size.
          mask_image: white where to repaint, or one per embedding. The network sees a mask one latent pixel wider; the
            rest of the image is its to keep.
          image_embeds, negative_image_embeds: ``[N,E]``, from the prior.
          height, width: in pixels, rounded up to a multiple of 64.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.PromptedEmbeddingOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        named = {"prompt": prompt, "image_embeds": image_embeds, "negative_image_embeds": negative_image_embeds}
        request = decoder_request(self, {**named, "guidance_scale": guidance_scale}, options, height, width)
        return repainted(request, self, image, mask_image)
