"""Stable Diffusion XL with ControlNets: inpainting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Unpack

from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import ControlOptions, XLControlInpaintOptions, split_options
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion_xl_controlnet import StableDiffusionXLControlNetPipeline
from diffuse_jax.pipelines.stable_diffusion_xl_inpaint import StableDiffusionXLInpaintPipeline
from diffuse_jax.pipelines.tasks import controlled


class StableDiffusionXLControlNetInpaintPipeline(StableDiffusionXLInpaintPipeline):
    """Repaints part of an image from prompts and control images."""

    required: ClassVar[tuple[str, ...]] = StableDiffusionXLControlNetPipeline.required

    def compose(
        self,
        prompt: Prompt | None = None,
        prompt_2: Prompt | None = None,
        image: ImageInput = None,
        mask_image: ImageInput = None,
        control_image: ImageInput = None,
        *,
        guidance_scale: float | Sequence[float] = 5.0,
        **options: Unpack[XLControlInpaintOptions],
    ) -> Request:
        """Repaint the white part of ``mask_image``. Arguments shared with
        :class:`StableDiffusionXLInpaintPipeline` have the same meaning.

        Args:
          prompt, prompt_2: for the two text encoders.
          image, mask_image: as for inpainting, like ``strength``.
          control_image: the control image, or one per prompt. With several ControlNets, a list with one image per
            ControlNet, or one such list per prompt.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.ControlOptions` (``controlnet_conditioning_scale`` is
            1 by default), :class:`~diffuse_jax.pipelines.options.InpaintOptions` and
            :class:`~diffuse_jax.pipelines.options.XLOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        control, others = split_options(options, ControlOptions)
        arguments = {"guidance_scale": guidance_scale, **others}
        request = super().compose(prompt, prompt_2, image, mask_image, **arguments)
        return controlled(request, self, control_image, control, scale=1.0)
