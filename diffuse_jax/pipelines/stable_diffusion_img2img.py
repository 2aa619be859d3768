"""Stable Diffusion 1.x and 2.x: image to image (Meng et al. 2021, SDEdit)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from diffuse_jax.pipelines.family import text_to_image
from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import TextOptions
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from diffuse_jax.pipelines.tasks import chosen_size, from_image


class StableDiffusionImg2ImgPipeline(StableDiffusionPipeline):
    """Images from prompts and an initial image that sets composition and colours."""

    def compose(
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        *,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.8,
        guidance_scale: float | Sequence[float] = 7.5,
        **options: Unpack[TextOptions],
    ) -> Request:
        """Generate images of the size of ``image``, or of ``height`` and ``width``.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          image: the initial image, or one per prompt; or latents ``[B,h,w,c]``.
          height, width: in pixels; those of the image if None. The image is resized to them.
          strength: in (0, 1], how much the image is changed: the fraction of the steps that is run.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
        size = chosen_size(self, image, "image", height, width)
        request = text_to_image(self, arguments, size, strength=strength)
        return from_image(request, self, image)
