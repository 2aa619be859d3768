"""Stable Diffusion 1.x and 2.x: text to image (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.families.stable_diffusion import STABLE_DIFFUSION
from diffuse_jax.pipelines.family import output_size, text_to_image
from diffuse_jax.pipelines.inputs import Prompt
from diffuse_jax.pipelines.inversion import invert
from diffuse_jax.pipelines.options import TextOptions
from diffuse_jax.pipelines.pipeline import DiffusionPipeline, verb
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.safety import SETTING


class StableDiffusionPipeline(DiffusionPipeline):
    """Images from prompts with one CLIP text encoder."""

    required: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    settings: ClassVar[Mapping[str, str]] = SETTING
    sampler_settings: ClassVar[Mapping[str, Any]] = {"steps_offset": 1, "clip_sample": False}
    family = STABLE_DIFFUSION

    def compose(
        self,
        prompt: Prompt | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | Sequence[float] = 7.5,
        **options: Unpack[TextOptions],
    ) -> Request:
        """Generate images.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          height, width: in pixels, multiples of the autoencoder's downsampling factor (8); the checkpoint's default
            size if None.
          guidance_scale: scale of classifier-free guidance, one value or one per image. Above 1 the network runs on a
            doubled batch; otherwise guidance is off, which is a separate compiled program.
          **options: negative prompt, steps, seed and everything else; see
            :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
        return text_to_image(self, arguments, output_size(self, height, width))

    invert = verb(invert)
