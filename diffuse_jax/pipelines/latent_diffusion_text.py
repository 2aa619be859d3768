"""Latent diffusion: text to image (Rombach et al. 2022, arXiv 2112.10752, section 4.3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Unpack

from diffuse_jax.pipelines.families.latent_diffusion import LATENT_DIFFUSION
from diffuse_jax.pipelines.family import output_size, text_to_image
from diffuse_jax.pipelines.inputs import Prompt
from diffuse_jax.pipelines.options import EncoderTextOptions
from diffuse_jax.pipelines.pipeline import DiffusionPipeline
from diffuse_jax.pipelines.running import Request


class LDMTextToImagePipeline(DiffusionPipeline):
    """Images from prompts with :class:`~diffuse_jax.text.LDMBertModel`; the autoencoder is either an
    :class:`~diffuse_jax.models.AutoencoderKL` or a :class:`~diffuse_jax.models.VQModel`."""

    required: ClassVar[tuple[str, ...]] = ("unet", "vqvae", "bert", "tokenizer", "scheduler")
    family = LATENT_DIFFUSION

    def compose(
        self,
        prompt: Prompt | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | Sequence[float] = 1.0,
        **options: Unpack[EncoderTextOptions],
    ) -> Request:
        """Generate images. Arguments shared with :class:`StableDiffusionPipeline` have the same meaning.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          height, width: in pixels, multiples of the autoencoder's downsampling factor (8); the checkpoint's default
            size (256) if None.
          guidance_scale: one value or one per image; 1 and below, the default, is without guidance. The published
            checkpoint's examples use 5 to 7.
          **options: see :class:`~diffuse_jax.pipelines.options.EncoderTextOptions`; 50 steps by default.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
        return text_to_image(self, arguments, output_size(self, height, width))
