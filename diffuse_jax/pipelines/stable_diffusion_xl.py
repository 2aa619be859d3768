"""Stable Diffusion XL: text to image with two text encoders and micro-conditioning (Podell et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Unpack

from diffuse_jax.pipelines.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from diffuse_jax.pipelines.family import output_size, text_to_image
from diffuse_jax.pipelines.inputs import Prompt
from diffuse_jax.pipelines.inversion import invert_xl
from diffuse_jax.pipelines.options import XLOptions
from diffuse_jax.pipelines.pipeline import DiffusionPipeline, verb
from diffuse_jax.pipelines.running import Request


class StableDiffusionXLPipeline(DiffusionPipeline):
    """Images from prompts with CLIP-L and OpenCLIP bigG, conditioned on size and crop."""

    required: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder_2", "tokenizer_2", "scheduler")
    settings: ClassVar[Mapping[str, str]] = {
        "force_zeros_for_empty_prompt": "honoured",
        "requires_aesthetics_score": "honoured",
        "add_watermarker": "images are not watermarked; true is logged",
    }
    family = STABLE_DIFFUSION_XL

    def compose(
        self,
        prompt: Prompt | None = None,
        prompt_2: Prompt | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | Sequence[float] = 5.0,
        **options: Unpack[XLOptions],
    ) -> Request:
        """Generate images. Arguments shared with :class:`StableDiffusionPipeline` have the same meaning.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds`` and ``pooled_prompt_embeds``.
          prompt_2: prompt for the second text encoder; ``prompt`` if None.
          height, width: in pixels; the checkpoint's default size if None.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.XLOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        arguments = {"prompt": prompt, "prompt_2": prompt_2, "guidance_scale": guidance_scale, **options}
        return text_to_image(self, arguments, output_size(self, height, width))

    invert = verb(invert_xl)
