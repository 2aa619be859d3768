"""Depth to image with Stable Diffusion 2: image to image that keeps the scene's depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.depth import keeping_depth
from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import TextOptions
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion_img2img import StableDiffusionImg2ImgPipeline


class StableDiffusionDepth2ImgPipeline(StableDiffusionImg2ImgPipeline):
    """Images from prompts and an initial image, whose depth the UNet sees. ``depth_estimator`` and
    ``feature_extractor`` are needed for calls without a depth map."""

    settings: ClassVar[Mapping[str, str]] = {}
    sampler_settings: ClassVar[Mapping[str, Any]] = {}

    def compose(  # type: ignore[override]
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        depth_map: Any = None,
        *,
        strength: float = 0.8,
        guidance_scale: float | Sequence[float] = 7.5,
        **options: Unpack[TextOptions],
    ) -> Request:
        """Generate images of the size of ``image``.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          image: the initial image, or one per prompt; or latents ``[B,h,w,c]`` together with ``depth_map``.
          depth_map: relative depth, larger where it is nearer, of any range and resolution: an array ``[H,W]`` or
            ``[B,H,W]``, or a list of them, one or one per prompt. If None, the depth estimator finds it in ``image``.
          strength: in (0, 1], how much the image is changed: the fraction of the steps that is run.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        request = super().compose(prompt, image, strength=strength, guidance_scale=guidance_scale, **options)
        return keeping_depth(request, self, image, depth_map)
