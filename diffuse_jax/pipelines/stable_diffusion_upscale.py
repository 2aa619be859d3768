"""The x4 upscaler of Stable Diffusion 2: a UNet over latents that sees the small image with noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.editing import upscaling
from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import TextOptions
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline


class StableDiffusionUpscalePipeline(StableDiffusionPipeline):
    """Images four times as high and wide (by the autoencoder's factor), guided by a prompt."""

    required: ClassVar[tuple[str, ...]] = (*StableDiffusionPipeline.required, "low_res_scheduler")
    settings: ClassVar[Mapping[str, str]] = {"max_noise_level": "honoured"}
    sampler_settings: ClassVar[Mapping[str, Any]] = {}

    def compose(  # type: ignore[override]
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        *,
        noise_level: int = 20,
        guidance_scale: float | Sequence[float] = 9.0,
        **options: Unpack[TextOptions],
    ) -> Request:
        """Generate the large images, in 75 steps by default. Arguments shared with :class:`StableDiffusionPipeline`
        have the same meaning.

        Args:
          prompt: what the image shows, or a list; or give ``prompt_embeds``.
          image: the small image, or one per prompt.
          noise_level: timestep to which the small image is noised, at most the checkpoint's ``max_noise_level`` (350);
            higher invents more.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
        return upscaling(self, image, noise_level, arguments)
