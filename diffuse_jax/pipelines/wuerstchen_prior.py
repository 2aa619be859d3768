"""Würstchen's first stage: semantic maps from prompts (Pernias et al. 2023, arXiv 2306.00637)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Unpack

from diffuse_jax.pipelines.families.wuerstchen import WUERSTCHEN_PRIOR
from diffuse_jax.pipelines.family import default_steps, text_to_image
from diffuse_jax.pipelines.inputs import Prompt, pixel_size
from diffuse_jax.pipelines.options import WuerstchenOptions
from diffuse_jax.pipelines.pipeline import DiffusionPipeline
from diffuse_jax.pipelines.running import Request


class WuerstchenPriorPipeline(DiffusionPipeline):
    """Semantic maps of images, 42 times smaller than the images, from prompts; ``out.image_embeddings``."""

    required: ClassVar[tuple[str, ...]] = ("prior", "text_encoder", "tokenizer", "scheduler")
    settings: ClassVar[Mapping[str, str]] = {
        "latent_mean": "maps are samples times this",
        "latent_std": "less this",
        "resolution_multiple": "pixels of the image along the edge of a map's pixel",
    }
    family = WUERSTCHEN_PRIOR

    def compose(
        self,
        prompt: Prompt | None = None,
        *,
        height: int = 1024,
        width: int = 1024,
        guidance_scale: float | Sequence[float] = 8.0,
        **options: Unpack[WuerstchenOptions],
    ) -> Request:
        """Generate maps, in 60 steps by default: ``out.image_embeddings``, float32 ``[B,k,l,c]``.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          height, width: of the image to come, in pixels; maps have a pixel for each ``resolution_multiple`` of them,
            rounded up.
          guidance_scale: scale of classifier-free guidance, one value or one per image; off if none is above 1.
          **options: see :class:`~diffuse_jax.pipelines.options.WuerstchenOptions`. ``timesteps`` are from 1 to 0;
            ``output_type="np"`` gives the maps as NumPy's.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
        return text_to_image(self, default_steps(arguments, 60), pixel_size(height, width))
