"""Stable Diffusion XL with ControlNets: text to image."""

from __future__ import annotations

from typing import ClassVar, Unpack

from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import ControlOptions, XLControlTextOptions, split_options
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from diffuse_jax.pipelines.tasks import control_size, controlled


class StableDiffusionXLControlNetPipeline(StableDiffusionXLPipeline):
    """Images from prompts and control images. ``controlnet`` is one network or several."""

    required: ClassVar[tuple[str, ...]] = (*StableDiffusionXLPipeline.required, "controlnet")

    def compose(
        self,
        prompt: Prompt | None = None,
        prompt_2: Prompt | None = None,
        image: ImageInput = None,
        *,
        height: int | None = None,
        width: int | None = None,
        **options: Unpack[XLControlTextOptions],
    ) -> Request:
        """Generate images. Arguments shared with :class:`StableDiffusionXLPipeline` have the same meaning.

        Args:
          prompt, prompt_2: for the two text encoders.
          image: the control image, or one per prompt. With several ControlNets, a list with one image per
            ControlNet, or one such list per prompt.
          height, width: in pixels; the control image's size if None.
          **options: see :class:`~diffuse_jax.pipelines.options.ControlOptions` (``controlnet_conditioning_scale`` is
            1 by default) and :class:`~diffuse_jax.pipelines.options.XLOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        control, others = split_options(options, ControlOptions)
        height, width = control_size(self, image, "image", height, width)
        request = super().compose(prompt, prompt_2, height=height, width=width, **others)
        return controlled(request, self, image, control, scale=1.0)
