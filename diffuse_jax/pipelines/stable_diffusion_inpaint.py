"""Stable Diffusion 1.x and 2.x: inpainting, with inpainting checkpoints or any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.inpainting import inpainting
from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import InpaintOptions, InpaintTextOptions, split_options
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline


class StableDiffusionInpaintPipeline(StableDiffusionPipeline):
    """Repaints part of an image from a prompt."""

    sampler_settings: ClassVar[Mapping[str, Any]] = {"steps_offset": 1, "skip_prk_steps": True}

    def compose(
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        mask_image: ImageInput = None,
        *,
        strength: float = 1.0,
        guidance_scale: float | Sequence[float] = 7.5,
        **options: Unpack[InpaintTextOptions],
    ) -> Request:
        """Repaint the white part of ``mask_image``.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          image: the original image, or one per prompt; or latents ``[B,h,w,c]``.
          mask_image: the mask, or one per prompt; white (at least 0.5) is repainted.
          strength: in (0, 1], how much the repainted part is changed; 1 starts from pure noise.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.InpaintOptions` and
            :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        inpaint, others = split_options(options, InpaintOptions)
        arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **others}
        return inpainting(self, image, mask_image, strength, inpaint, arguments)
