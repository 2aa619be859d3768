"""Stable Diffusion XL with ControlNets: image to image."""

from __future__ import annotations

from typing import ClassVar, Unpack

from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import ControlOptions, XLControlImageOptions, split_options
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion_xl_controlnet import StableDiffusionXLControlNetPipeline
from diffuse_jax.pipelines.stable_diffusion_xl_img2img import StableDiffusionXLImg2ImgPipeline
from diffuse_jax.pipelines.tasks import controlled


class StableDiffusionXLControlNetImg2ImgPipeline(StableDiffusionXLImg2ImgPipeline):
    """Images from prompts, an initial image and control images."""

    required: ClassVar[tuple[str, ...]] = StableDiffusionXLControlNetPipeline.required

    def compose(  # type: ignore[override]
        self,
        prompt: Prompt | None = None,
        prompt_2: Prompt | None = None,
        image: ImageInput = None,
        control_image: ImageInput = None,
        *,
        strength: float = 0.8,
        **options: Unpack[XLControlImageOptions],
    ) -> Request:
        """Generate images of the size of ``image``, or of ``height`` and ``width``. Arguments shared with
        :class:`StableDiffusionXLImg2ImgPipeline` have the same meaning.

        Args:
          prompt, prompt_2: for the two text encoders.
          image: the initial image, or one per prompt; or latents ``[B,h,w,c]``.
          control_image: the control image, or one per prompt. With several ControlNets, a list with one image per
            ControlNet, or one such list per prompt.
          strength: in (0, 1], how much the image is changed.
          **options: see :class:`~diffuse_jax.pipelines.options.ControlOptions` (``controlnet_conditioning_scale`` is
            0.8 by default) and :class:`~diffuse_jax.pipelines.options.XLOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        control, others = split_options(options, ControlOptions)
        request = super().compose(prompt, prompt_2, image, strength=strength, **others)
        return controlled(request, self, control_image, control, scale=0.8)
