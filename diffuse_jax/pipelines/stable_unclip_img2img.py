"""Stable unCLIP: variations of an image, which a prompt may lead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.families.stable_unclip import STABLE_UNCLIP
from diffuse_jax.pipelines.family import default_steps, output_size, request_of
from diffuse_jax.pipelines.inputs import ImageInput, Prompt, number_of_prompts
from diffuse_jax.pipelines.options import StableUnCLIPOptions, check_names
from diffuse_jax.pipelines.pipeline import DiffusionPipeline
from diffuse_jax.pipelines.priors import seen_images, with_images
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_unclip import STEPS


class StableUnCLIPImg2ImgPipeline(DiffusionPipeline):
    """Images that resemble an image, which a CLIP vision encoder sees."""

    required: ClassVar[tuple[str, ...]] = (
        *("feature_extractor", "image_encoder", "image_normalizer", "image_noising_scheduler"),
        *("tokenizer", "text_encoder", "unet", "scheduler", "vae"),
    )
    family = STABLE_UNCLIP

    def compose(
        self,
        image: ImageInput = None,
        prompt: Prompt | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | Sequence[float] = 10.0,
        image_embeds: Any = None,
        **options: Unpack[StableUnCLIPOptions],
    ) -> Request:
        """Generate variations, in 20 steps by default. Arguments shared with :class:`StableDiffusionPipeline` have the
        same meaning.

        Args:
          image: one image of any size, or one per prompt.
          prompt: one prompt or a list; empty, one for each image, if None.
          height, width: in pixels, of the variations; the checkpoint's default size if None.
          guidance_scale: one value, or one per image. It leads away from the negative prompt without an image.
          image_embeds: embeddings ``[N,E]`` of the image encoder instead of images.
          **options: see :class:`~diffuse_jax.pipelines.options.StableUnCLIPOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        check_names(type(self), options, StableUnCLIPOptions)
        name, array = seen_images(self, image, image_embeds, "image_embeds")
        given: dict[str, Any] = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
        if prompt is None and given.get("prompt_embeds") is None:
            given["prompt"] = [""] * len(array)
        given = {key: value for key, value in given.items() if value is not None}
        prompts = number_of_prompts(given.get("prompt"), given.get("prompt_embeds"))
        request = request_of(self, default_steps(given, STEPS), prompts, output_size(self, height, width))
        return with_images(request, self, name, array)
