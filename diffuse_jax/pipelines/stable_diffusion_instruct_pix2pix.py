"""InstructPix2Pix: edit an image as a prompt instructs (Brooks et al. 2023), with Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.editing import instructed
from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import TextOptions
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from diffuse_jax.pipelines.tasks import input_size


class StableDiffusionInstructPix2PixPipeline(StableDiffusionPipeline):
    """Edits an image as a prompt instructs ("make it winter"); the UNet sees the image's latents."""

    sampler_settings: ClassVar[Mapping[str, Any]] = {}

    def compose(  # type: ignore[override]
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        *,
        guidance_scale: float | Sequence[float] = 7.5,
        image_guidance_scale: float | Sequence[float] = 1.5,
        **options: Unpack[TextOptions],
    ) -> Request:
        """Generate edited images of the size of ``image``, in 100 steps by default. Arguments shared with
        :class:`StableDiffusionPipeline` have the same meaning.

        Args:
          prompt: the instruction, or a list; or give ``prompt_embeds``.
          image: the image, or one per prompt; or latents ``[B,h,w,c]`` without the autoencoder's scaling.
          guidance_scale: how closely to follow the prompt, one value or one per image.
          image_guidance_scale: how closely to follow the image; higher changes it less. Below 1 there is no guidance.
          **options: see :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
        size = input_size(self, image, "image")
        return instructed(self, image, size, arguments, image_guidance_scale=image_guidance_scale)
