"""Kandinsky 2.2: images that follow a hint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.inputs import ImageInput
from diffuse_jax.pipelines.kandinsky_decoding import decoder_request, with_hint
from diffuse_jax.pipelines.kandinsky_v22 import KandinskyV22Pipeline
from diffuse_jax.pipelines.options import EmbeddingOptions
from diffuse_jax.pipelines.running import Request


class KandinskyV22ControlnetPipeline(KandinskyV22Pipeline):
    """Images from embeddings that follow an image, such as a map of depth."""

    added: ClassVar[str] = "image_hint"

    def compose(  # type: ignore[override]
        self,
        image_embeds: Any = None,
        hint: ImageInput = None,
        negative_image_embeds: Any = None,
        *,
        height: int = 512,
        width: int = 512,
        guidance_scale: float | Sequence[float] = 4.0,
        **options: Unpack[EmbeddingOptions],
    ) -> Request:
        """Generate images. Arguments shared with :class:`KandinskyV22Pipeline` have the same meaning.

        Args:
          image_embeds, negative_image_embeds: ``[N,E]``, from the prior.
          hint: the image to follow, such as a map of depth, in [0, 1], or one per embedding.
          height, width: in pixels, rounded up to a multiple of 64.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.EmbeddingOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        embeds = {"image_embeds": image_embeds, "negative_image_embeds": negative_image_embeds}
        named = {**embeds, "guidance_scale": guidance_scale}
        request = decoder_request(self, named, options, height, width)
        return with_hint(request, self, hint)
