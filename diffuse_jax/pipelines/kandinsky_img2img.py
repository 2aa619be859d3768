"""Kandinsky 2.1: image to image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.kandinsky import KandinskyPipeline
from diffuse_jax.pipelines.kandinsky_decoding import decoder_request, from_mixed_image
from diffuse_jax.pipelines.options import PromptedEmbeddingOptions
from diffuse_jax.pipelines.running import Request


class KandinskyImg2ImgPipeline(KandinskyPipeline):
    """Images from prompts, embeddings and an initial image that sets composition and colours."""

    def compose(  # type: ignore[override]
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        image_embeds: Any = None,
        negative_image_embeds: Any = None,
        *,
        strength: float = 0.3,
        height: int = 512,
        width: int = 512,
        guidance_scale: float | Sequence[float] = 7.0,
        **options: Unpack[PromptedEmbeddingOptions],
    ) -> Request:
        """Generate images. Arguments shared with :class:`KandinskyPipeline` have the same meaning.

        Args:
          prompt: one for all embeddings, or a list; each is for as many consecutive embeddings.
          image: the initial image, or one per embedding; or latents ``[B,h,w,c]``. It is resized to the output's size.
          image_embeds, negative_image_embeds: ``[N,E]``, from the prior.
          strength: in (0, 1], how much the image is changed: the fraction of the steps that is run. The noise that the
            image gets follows from it, not from the sampler.
          height, width: in pixels, rounded up to a multiple of 64.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.PromptedEmbeddingOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        named = {"prompt": prompt, "image_embeds": image_embeds, "negative_image_embeds": negative_image_embeds}
        named |= {"guidance_scale": guidance_scale}
        request = decoder_request(self, named, options, height, width, strength=strength)
        return from_mixed_image(request, self, image, strength)
