"""Stable Diffusion 1.x and 2.x with ControlNets (Zhang et al. 2023): text to image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import ControlOptions, ControlTextOptions, split_options
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from diffuse_jax.pipelines.tasks import control_size, controlled


class StableDiffusionControlNetPipeline(StableDiffusionPipeline):
    """Images from prompts and control images (edges, depth, poses). ``controlnet`` is one network or several."""

    required: ClassVar[tuple[str, ...]] = (*StableDiffusionPipeline.required, "controlnet")
    sampler_settings: ClassVar[Mapping[str, Any]] = {}

    def compose(
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        *,
        height: int | None = None,
        width: int | None = None,
        **options: Unpack[ControlTextOptions],
    ) -> Request:
        """Generate images. Arguments shared with :class:`StableDiffusionPipeline` have the same meaning.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          image: the control image, or one per prompt. With several ControlNets, a list with one image per ControlNet,
            or one such list per prompt.
          height, width: in pixels; the control image's size if None.
          **options: see :class:`~diffuse_jax.pipelines.options.ControlOptions` (``controlnet_conditioning_scale`` is 1
            by default) and :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        control, others = split_options(options, ControlOptions)
        height, width = control_size(self, image, "image", height, width)
        request = super().compose(prompt, height=height, width=width, **others)
        return controlled(request, self, image, control, scale=1.0)
