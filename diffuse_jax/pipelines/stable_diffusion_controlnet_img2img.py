"""Stable Diffusion 1.x and 2.x with ControlNets: image to image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Unpack

from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import TextOptions
from diffuse_jax.pipelines.run import Request
from diffuse_jax.pipelines.stable_diffusion_controlnet import StableDiffusionControlNetPipeline
from diffuse_jax.pipelines.stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from diffuse_jax.pipelines.tasks import controlled


class StableDiffusionControlNetImg2ImgPipeline(StableDiffusionImg2ImgPipeline):
    """Images from prompts, an image that they start from, and control images."""

    required: ClassVar[tuple[str, ...]] = StableDiffusionControlNetPipeline.required

    def compose(  # type: ignore[override]
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        control_image: ImageInput = None,
        *,
        strength: float = 0.8,
        guidance_scale: float | Sequence[float] = 7.5,
        controlnet_conditioning_scale: float | Sequence[float] = 0.8,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        **options: Unpack[TextOptions],
    ) -> Request:
        """Make images of the size of ``image``. Arguments of :class:`StableDiffusionImg2ImgPipeline` and of
        :class:`StableDiffusionControlNetPipeline` mean the same here.

        Args:
          prompt, image, strength, guidance_scale: as for image to image.
          control_image: the control image, or one per prompt; with several ControlNets a list with one for each, or
            such a list for each prompt.
          controlnet_conditioning_scale, control_guidance_start, control_guidance_end: as for ControlNets.
          **options: see :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is impossible or contradicts another one; nothing has been compiled.
        """
        request = super().compose(prompt, image, strength=strength, guidance_scale=guidance_scale, **options)
        return controlled(
            request,
            self,
            control_image,
            scale=controlnet_conditioning_scale,
            start=control_guidance_start,
            end=control_guidance_end,
            copies=options.get("num_images_per_prompt", 1),
        )
