"""Kandinsky 2.2: inpainting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.inputs import ImageInput
from diffuse_jax.pipelines.kandinsky_decoding import decoder_request, repainted, restored
from diffuse_jax.pipelines.kandinsky_v22 import KandinskyV22Pipeline
from diffuse_jax.pipelines.options import EmbeddingOptions
from diffuse_jax.pipelines.running import Request


class KandinskyV22InpaintPipeline(KandinskyV22Pipeline):
    """Repaints the masked part of an image from embeddings."""

    masked: ClassVar[bool] = True

    def compose(  # type: ignore[override]
        self,
        image_embeds: Any = None,
        image: ImageInput = None,
        mask_image: ImageInput = None,
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
          image: the initial image, or one per embedding; or latents ``[B,h,w,c]``. It is resized to the output's size.
          mask_image: white where to repaint, or one per embedding. A latent pixel more around it is repainted too.
          height, width: in pixels, rounded up to a multiple of 64.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.EmbeddingOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        embeds = {"image_embeds": image_embeds, "negative_image_embeds": negative_image_embeds}
        named = {**embeds, "guidance_scale": guidance_scale}
        request = decoder_request(self, named, options, height, width)
        return restored(repainted(request, self, image, mask_image))
