"""Variations of an image, with Stable Diffusion fine-tuned on embeddings of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Unpack

from diffuse_jax.pipelines.families.image_variation import IMAGE_VARIATION
from diffuse_jax.pipelines.family import output_size, request_of
from diffuse_jax.pipelines.inputs import ImageInput, image_sizes
from diffuse_jax.pipelines.options import ImageVariationOptions, check_names
from diffuse_jax.pipelines.pipeline import DiffusionPipeline
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.safety import SETTING
from diffuse_jax.pipelines.tasks import require_image


class StableDiffusionImageVariationPipeline(DiffusionPipeline):
    """Images that resemble an image, which a CLIP vision encoder sees; there is no prompt."""

    required: ClassVar[tuple[str, ...]] = ("unet", "vae", "image_encoder", "feature_extractor", "scheduler")
    settings: ClassVar[Mapping[str, str]] = SETTING
    family = IMAGE_VARIATION

    def compose(
        self,
        image: ImageInput = None,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | Sequence[float] = 7.5,
        **options: Unpack[ImageVariationOptions],
    ) -> Request:
        """Generate variations. Arguments shared with :class:`StableDiffusionPipeline` have the same meaning.

        Args:
          image: one image of any size, or several.
          height, width: in pixels, of the variations; the checkpoint's default size if None.
          guidance_scale: how closely to follow the image, one value or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.ImageVariationOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        check_names(type(self), options, ImageVariationOptions)
        require_image(image, "image")
        given = {"image": image, "guidance_scale": guidance_scale, **options}
        given = {name: value for name, value in given.items() if value is not None}
        return request_of(self, given, len(image_sizes(image, "image")), output_size(self, height, width))
