"""Stable Diffusion XL: inpainting, with inpainting checkpoints or any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from diffuse_jax.pipelines.families import STABLE_DIFFUSION_XL_FROM_IMAGE
from diffuse_jax.pipelines.inpainting import inpainting
from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import InpaintOptions, XLInpaintOptions, split_options
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline


class StableDiffusionXLInpaintPipeline(StableDiffusionXLPipeline):
    """Repaints part of an image from prompts."""

    family = STABLE_DIFFUSION_XL_FROM_IMAGE

    def compose(
        self,
        prompt: Prompt | None = None,
        prompt_2: Prompt | None = None,
        image: ImageInput = None,
        mask_image: ImageInput = None,
        *,
        strength: float = 0.9999,
        guidance_scale: float | Sequence[float] = 7.5,
        **options: Unpack[XLInpaintOptions],
    ) -> Request:
        """Repaint the white part of ``mask_image``. Arguments shared with :class:`StableDiffusionInpaintPipeline` and
        :class:`StableDiffusionXLPipeline` have the same meaning.

        Args:
          prompt, prompt_2: for the two text encoders.
          image, mask_image, guidance_scale: as for Stable Diffusion inpainting.
          strength: in (0, 1]; a value just below 1 starts from noise with a trace of the image, as SDXL's inpainting
            checkpoints were trained.
          **options: see :class:`~diffuse_jax.pipelines.options.XLInpaintOptions`,
            :class:`~diffuse_jax.pipelines.options.InpaintOptions` and
            :class:`~diffuse_jax.pipelines.options.XLOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        inpaint, others = split_options(options, InpaintOptions)
        start = others.pop("denoising_start", None)
        arguments = {"prompt": prompt, "prompt_2": prompt_2, "guidance_scale": guidance_scale, **others}
        return inpainting(self, image, mask_image, strength, inpaint, arguments, denoising_start=start)
