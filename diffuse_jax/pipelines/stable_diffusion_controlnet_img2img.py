"""Stable Diffusion 1.x and 2.x with ControlNets: image to image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import ControlImageOptions, ControlOptions, split_options
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion_controlnet import StableDiffusionControlNetPipeline
from diffuse_jax.pipelines.stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from diffuse_jax.pipelines.tasks import controlled


class StableDiffusionControlNetImg2ImgPipeline(StableDiffusionImg2ImgPipeline):
    """Images from prompts, an initial image and control images."""

    required: ClassVar[tuple[str, ...]] = StableDiffusionControlNetPipeline.required
    sampler_settings: ClassVar[Mapping[str, Any]] = {}

    def compose(
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        control_image: ImageInput = None,
        **options: Unpack[ControlImageOptions],
    ) -> Request:
        """Generate images of the size of ``image``, or of ``height`` and ``width``. Arguments shared with
        :class:`StableDiffusionImg2ImgPipeline` and :class:`StableDiffusionControlNetPipeline` have the same meaning.

        Args:
          prompt, image: as for image to image, like ``height``, ``width``, ``strength`` and ``guidance_scale``.
          control_image: the control image, or one per prompt. With several ControlNets, a list with one image per
            ControlNet, or one such list per prompt.
          **options: see :class:`~diffuse_jax.pipelines.options.ControlOptions` (``controlnet_conditioning_scale`` is
            0.8 by default) and :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        control, others = split_options(options, ControlOptions)
        return controlled(super().compose(prompt, image, **others), self, control_image, control, scale=0.8)
