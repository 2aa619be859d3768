"""Stable Diffusion's x2 latent upscaler: a UNet of k-diffusion between latents of one size and twice that size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.families.latent_upscaler import LATENT_UPSCALER
from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.latent_upscaling import latents_upscaled
from diffuse_jax.pipelines.options import PooledTextOptions
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline


class StableDiffusionLatentUpscalePipeline(StableDiffusionPipeline):
    """Images twice as high and wide, from an image or from another pipeline's latents."""

    settings: ClassVar[Mapping[str, str]] = {}
    sampler_settings: ClassVar[Mapping[str, Any]] = {}
    family = LATENT_UPSCALER

    def compose(  # type: ignore[override]
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        *,
        guidance_scale: float | Sequence[float] = 9.0,
        **options: Unpack[PooledTextOptions],
    ) -> Request:
        """Generate the large images, in 75 steps by default. Arguments shared with :class:`StableDiffusionPipeline`
        have the same meaning.

        Args:
          prompt: what the image shows, or a list; or give ``prompt_embeds`` and ``pooled_prompt_embeds``.
          image: the small image, or one per prompt; or latents ``[B,h,w,c]``, as ``output_type="latent"`` returns them.
            Latents on the device stay there.
          guidance_scale: one value, or one per image. Where it is 0, the prompt is not used.
          **options: see :class:`~diffuse_jax.pipelines.options.PooledTextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        return latents_upscaled(self, image, {"prompt": prompt, "guidance_scale": guidance_scale, **options})
