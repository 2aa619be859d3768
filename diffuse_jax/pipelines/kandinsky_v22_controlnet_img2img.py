"""Kandinsky 2.2: image to image that follows a hint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.inputs import ImageInput
from diffuse_jax.pipelines.kandinsky_decoding import decoder_request, from_initial_image, with_hint
from diffuse_jax.pipelines.kandinsky_v22 import KandinskyV22Pipeline
from diffuse_jax.pipelines.options import EmbeddingOptions
from diffuse_jax.pipelines.running import Request


class KandinskyV22ControlnetImg2ImgPipeline(KandinskyV22Pipeline):
    """Images from embeddings and an initial image that follow another image."""

    added: ClassVar[str] = "image_hint"

    def compose(  # type: ignore[override]
        self,
        image_embeds: Any = None,
        image: ImageInput = None,
        negative_image_embeds: Any = None,
        *,
        hint: ImageInput = None,
        strength: float = 0.3,
        height: int = 512,
        width: int = 512,
        guidance_scale: float | Sequence[float] = 4.0,
        **options: Unpack[EmbeddingOptions],
    ) -> Request:
        """Generate images. Arguments shared with :class:`KandinskyV22Pipeline` have the same meaning.

        Args:
          image_embeds, negative_image_embeds: ``[N,E]``, from the prior.
          image: the initial image, or one per embedding; or latents ``[B,h,w,c]``. It is resized to the output's size.
          hint: the image to follow, such as a map of depth, in [0, 1], or one per embedding.
          strength: in (0, 1], how much the image is changed: the fraction of the steps that is run.
          height, width: in pixels, rounded up to a multiple of 64.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.EmbeddingOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        embeds = {"image_embeds": image_embeds, "negative_image_embeds": negative_image_embeds}
        named = {**embeds, "guidance_scale": guidance_scale}
        request = decoder_request(self, named, options, height, width, strength=strength)
        return with_hint(from_initial_image(request, self, image), self, hint)
