"""Stable Diffusion 1.x and 2.x with ControlNets: inpainting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import ControlInpaintOptions, ControlOptions, split_options
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion_controlnet import StableDiffusionControlNetPipeline
from diffuse_jax.pipelines.stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffuse_jax.pipelines.tasks import controlled


class StableDiffusionControlNetInpaintPipeline(StableDiffusionInpaintPipeline):
    """Repaints part of an image from a prompt and control images."""

    required: ClassVar[tuple[str, ...]] = StableDiffusionControlNetPipeline.required
    sampler_settings: ClassVar[Mapping[str, Any]] = {}

    def compose(
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        mask_image: ImageInput = None,
        control_image: ImageInput = None,
        **options: Unpack[ControlInpaintOptions],
    ) -> Request:
        """Repaint the white part of ``mask_image``. Arguments shared with :class:`StableDiffusionInpaintPipeline` and
        :class:`StableDiffusionControlNetPipeline` have the same meaning.

        Args:
          prompt, image, mask_image: as for inpainting, like ``strength`` and ``guidance_scale``.
          control_image: the control image, or one per prompt. With several ControlNets, a list with one image per
            ControlNet, or one such list per prompt.
          **options: see :class:`~diffuse_jax.pipelines.options.ControlOptions` (``controlnet_conditioning_scale`` is
            0.5 by default), :class:`~diffuse_jax.pipelines.options.InpaintOptions` and
            :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        control, others = split_options(options, ControlOptions)
        request = super().compose(prompt, image, mask_image, **others)
        return controlled(request, self, control_image, control, scale=0.5)
