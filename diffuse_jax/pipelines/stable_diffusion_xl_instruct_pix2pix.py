"""InstructPix2Pix with Stable Diffusion XL, and CosXL-Edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Unpack

from diffuse_jax.pipelines.editing import instructed
from diffuse_jax.pipelines.family import output_size
from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import XLOptions
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from diffuse_jax.pipelines.tasks import is_latents, require_image, vae_of


class StableDiffusionXLInstructPix2PixPipeline(StableDiffusionXLPipeline):
    """Edits an image as a prompt instructs; the UNet sees the image's latents."""

    settings: ClassVar[Mapping[str, str]] = {
        **StableDiffusionXLPipeline.settings,
        "is_cosxl_edit": "honoured",
    }

    def compose(
        self,
        prompt: Prompt | None = None,
        prompt_2: Prompt | None = None,
        image: ImageInput = None,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | Sequence[float] = 5.0,
        image_guidance_scale: float | Sequence[float] = 1.5,
        **options: Unpack[XLOptions],
    ) -> Request:
        """Generate edited images, in 100 steps by default. Arguments shared with :class:`StableDiffusionXLPipeline`
        have the same meaning.

        Args:
          prompt, prompt_2: the instruction, for the two text encoders.
          image: the image, or one per prompt; or latents ``[B,h,w,c]`` as the network takes them.
          height, width: in pixels, to which PIL images are resized; the checkpoint's default size if None.
          guidance_scale: how closely to follow the prompt, one value or one per image.
          image_guidance_scale: how closely to follow the image; higher changes it less. Below 1 there is no guidance.
          **options: see :class:`~diffuse_jax.pipelines.options.XLOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        require_image(image, "image")
        scale = vae_of(self).config.scale
        if is_latents(image, vae_of(self)):
            height = image.shape[1] * scale if height is None else height
            width = image.shape[2] * scale if width is None else width
        size = output_size(self, height, width)
        arguments = {"prompt": prompt, "prompt_2": prompt_2, "guidance_scale": guidance_scale, **options}
        scaled = bool(self.options.get("is_cosxl_edit", False))
        return instructed(self, image, size, arguments, image_guidance_scale=image_guidance_scale, scaled=scaled)
