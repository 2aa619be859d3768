"""Stable Diffusion 1.x and 2.x: inpainting, with inpainting checkpoints and with any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import InpaintOptions, InpaintTextOptions, apart
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from diffuse_jax.pipelines.tasks import inpainting


class StableDiffusionInpaintPipeline(StableDiffusionPipeline):
    """Paints a part of an image anew, from a prompt."""

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
        """Make images in which the white part of ``mask_image`` is new.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          image: one, or one per prompt; or latents ``[B,h,w,c]``.
          mask_image: white (at least one half) where to paint; one, or one per prompt.
          strength: in (0, 1], how much of the painted part is replaced; 1 starts from noise alone.
          guidance_scale: one, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.InpaintOptions` and
            :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is impossible or contradicts another one; nothing has been compiled.
        """
        own, others = apart(options, InpaintOptions)
        asked = {"prompt": prompt, "guidance_scale": guidance_scale, **others}
        return inpainting(self, image, mask_image, strength, own, asked)
