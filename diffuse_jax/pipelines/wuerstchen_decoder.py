"""Würstchen's second stage: images from semantic maps (Pernias et al. 2023, arXiv 2306.00637)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.families.wuerstchen import WUERSTCHEN_DECODER, checked_maps, size_of_images
from diffuse_jax.pipelines.family import default_steps, text_to_image
from diffuse_jax.pipelines.inputs import Prompt, spread_prompts
from diffuse_jax.pipelines.options import WuerstchenOptions
from diffuse_jax.pipelines.pipeline import DiffusionPipeline
from diffuse_jax.pipelines.running import Request


class WuerstchenDecoderPipeline(DiffusionPipeline):
    """Images from the maps of :class:`WuerstchenPriorPipeline` and the same prompts."""

    required: ClassVar[tuple[str, ...]] = ("decoder", "vqgan", "text_encoder", "tokenizer", "scheduler")
    settings: ClassVar[Mapping[str, str]] = {"latent_dim_scale": "latents along the edge of a map's pixel"}
    family = WUERSTCHEN_DECODER

    def compose(
        self,
        image_embeddings: Any = None,
        prompt: Prompt | None = None,
        *,
        guidance_scale: float | Sequence[float] = 0.0,
        **options: Unpack[WuerstchenOptions],
    ) -> Request:
        """Generate images, in 12 steps by default.

        Args:
          image_embeddings: maps ``[B,k,l,c]``, or a list of such arrays.
          prompt: one prompt or a list, for as many consecutive maps each; or give ``prompt_embeds``, one per map.
          guidance_scale: scale of classifier-free guidance, one value or one per image; off if none is above 1.
          **options: see :class:`~diffuse_jax.pipelines.options.WuerstchenOptions`. ``timesteps`` are from 1 to 0,
            ``num_images_per_prompt`` is the number of images per map.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        maps = checked_maps(self, image_embeddings)
        given: dict[str, Any] = {"prompt": prompt, "image_embeddings": maps, **options}
        for name in ("prompt", "negative_prompt"):
            if given.get(name) is not None:
                given[name] = spread_prompts(given[name], len(maps), name, "image_embeddings")
        arguments = {"guidance_scale": guidance_scale, **given}
        return text_to_image(self, default_steps(arguments, 12), size_of_images(self, maps))
