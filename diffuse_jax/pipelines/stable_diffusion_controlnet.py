"""Stable Diffusion 1.x and 2.x with ControlNets (Zhang et al. 2023): text to image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Unpack

from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import TextOptions
from diffuse_jax.pipelines.run import Request
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from diffuse_jax.pipelines.tasks import control_size, controlled


class StableDiffusionControlNetPipeline(StableDiffusionPipeline):
    """Images from prompts and control images: edges, depth, poses. ``controlnet`` is one network or several."""

    required: ClassVar[tuple[str, ...]] = (*StableDiffusionPipeline.required, "controlnet")

    def compose(
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | Sequence[float] = 7.5,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        **options: Unpack[TextOptions],
    ) -> Request:
        """Make images.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          image: the control image, or one per prompt; with several ControlNets a list with one for each, or
            such a list for each prompt.
          height, width: in pixels; the control image's if None.
          guidance_scale: one, or one per image.
          controlnet_conditioning_scale: strength, one or one per ControlNet.
          control_guidance_start, control_guidance_end: share of the steps before and after which a ControlNet does not
            act, one or one per ControlNet.
          **options: see :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is impossible or contradicts another one; nothing has been compiled.
        """
        height, width = control_size(self, image, "image", height, width)
        request = super().compose(prompt, height=height, width=width, guidance_scale=guidance_scale, **options)
        return controlled(
            request,
            self,
            image,
            scale=controlnet_conditioning_scale,
            start=control_guidance_start,
            end=control_guidance_end,
            copies=options.get("num_images_per_prompt", 1),
        )
