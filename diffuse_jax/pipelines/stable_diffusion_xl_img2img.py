"""Stable Diffusion XL: image to image, and the rest of a run that another model began."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from diffuse_jax.pipelines.families import STABLE_DIFFUSION_XL_FROM_IMAGE
from diffuse_jax.pipelines.family import text_to_image
from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import XLOptions
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from diffuse_jax.pipelines.tasks import chosen_size, from_image, from_latents


class StableDiffusionXLImg2ImgPipeline(StableDiffusionXLPipeline):
    """Images from prompts and an initial image that sets composition and colours."""

    family = STABLE_DIFFUSION_XL_FROM_IMAGE

    def compose(
        self,
        prompt: Prompt | None = None,
        prompt_2: Prompt | None = None,
        image: ImageInput = None,
        *,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.3,
        denoising_start: float | None = None,
        guidance_scale: float | Sequence[float] = 5.0,
        **options: Unpack[XLOptions],
    ) -> Request:
        """Generate images of the size of ``image``, or of ``height`` and ``width``. Arguments shared with
        :class:`StableDiffusionXLPipeline` have the same meaning.

        Args:
          prompt, prompt_2: for the two text encoders.
          image: the initial image, or one per prompt; or latents ``[B,h,w,c]``.
          height, width: in pixels; those of the image if None. The image is resized to them.
          strength: in (0, 1], how much the image is changed: the fraction of the steps that is run.
          denoising_start: fraction in (0, 1) of the schedule that another model has already run; ``image`` is then its
            noisy latents, no noise is added, and ``strength`` is ignored.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.XLOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        arguments = {"prompt": prompt, "prompt_2": prompt_2, "guidance_scale": guidance_scale, **options}
        size = chosen_size(self, image, "image", height, width)
        if denoising_start is not None:
            request = text_to_image(self, arguments, size, denoising_start=denoising_start)
            return from_latents(request, self, image)
        request = text_to_image(self, arguments, size, strength=strength)
        return from_image(request, self, image)
