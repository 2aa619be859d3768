"""DeepFloyd IF, second stage: the first stage's images of 64 pixels at 256."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Unpack

from diffuse_jax.pipelines.deepfloyd_if import IFPipeline
from diffuse_jax.pipelines.family import output_size
from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import PixelTextOptions
from diffuse_jax.pipelines.pixel_tasks import fitted_size, from_pixels, pixel_request, repainted, super_resolved
from diffuse_jax.pipelines.running import Request


class IFSuperResolutionPipeline(IFPipeline):
    """Small images at 256 pixels, guided by their prompts."""

    required: ClassVar[tuple[str, ...]] = (*IFPipeline.required, "image_noising_scheduler")

    def compose(
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        *,
        height: int | None = None,
        width: int | None = None,
        noise_level: int = 250,
        guidance_scale: float | Sequence[float] = 4.0,
        **options: Unpack[PixelTextOptions],
    ) -> Request:
        """Enlarge images, in 50 steps by default.

        Args:
          prompt: what they show, one prompt or a list; or give ``prompt_embeds``.
          image: the small image, or one per prompt: the first stage's, with ``output_type="np"`` or ``"jax"``
            unrounded.
          height, width: of the large one in pixels; the checkpoint's default size (256) if None.
          noise_level: timestep to which the small image is noised, 0 to 999; higher invents more.
          guidance_scale, options: as in :class:`IFPipeline`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
        request = pixel_request(self, arguments, output_size(self, height, width), 50)
        return super_resolved(request, self, image, noise_level)


class IFImg2ImgSuperResolutionPipeline(IFSuperResolutionPipeline):
    """Small images at 256 pixels, starting from the image that the first stage changed."""

    def compose(  # type: ignore[override]
        self,
        image: ImageInput = None,
        original_image: ImageInput = None,
        prompt: Prompt | None = None,
        *,
        strength: float = 0.8,
        noise_level: int = 250,
        guidance_scale: float | Sequence[float] = 4.0,
        **options: Unpack[PixelTextOptions],
    ) -> Request:
        """Enlarge images, in 50 steps (of which ``strength`` says how many are run) by default.

        Args:
          image, prompt, noise_level, guidance_scale, options: as in :class:`IFSuperResolutionPipeline`.
          original_image: what the first stage changed, or one per prompt; a PIL image is resized.
          strength: in (0, 1], how much that is changed.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
        size = fitted_size(self, original_image, "original_image")
        request = pixel_request(self, arguments, size, 50, strength=strength)
        request = from_pixels(request, original_image, "original_image")
        return super_resolved(request, self, image, noise_level)


class IFInpaintingSuperResolutionPipeline(IFSuperResolutionPipeline):
    """Repainted images at 256 pixels, with the original around what was repainted."""

    def compose(  # type: ignore[override]
        self,
        image: ImageInput = None,
        original_image: ImageInput = None,
        mask_image: ImageInput = None,
        prompt: Prompt | None = None,
        *,
        strength: float = 0.8,
        noise_level: int = 0,
        guidance_scale: float | Sequence[float] = 4.0,
        **options: Unpack[PixelTextOptions],
    ) -> Request:
        """Enlarge images where the mask is white, in 100 steps by default.

        Args:
          image, original_image, prompt, strength, noise_level, guidance_scale, options: as in
            :class:`IFImg2ImgSuperResolutionPipeline`.
          mask_image: the mask, or one per prompt; white (at least 0.5) is repainted.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
        size = fitted_size(self, original_image, "original_image")
        request = pixel_request(self, arguments, size, 100, strength=strength)
        request = repainted(request, original_image, mask_image, "original_image")
        return super_resolved(request, self, image, noise_level)
