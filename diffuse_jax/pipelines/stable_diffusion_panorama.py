"""MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113): panoramas with Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.inputs import Prompt
from diffuse_jax.pipelines.modifiers.features import Windows
from diffuse_jax.pipelines.options import GuidedTextOptions
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline


class StableDiffusionPanoramaPipeline(StableDiffusionPipeline):
    """Wide images from prompts: the mean of predictions on overlapping windows of 64 x 64 latents."""

    sampler_settings: ClassVar[Mapping[str, Any]] = {}

    def compose(
        self,
        prompt: Prompt | None = None,
        *,
        height: int | None = 512,
        width: int | None = 2048,
        view_batch_size: int = 1,
        circular_padding: bool = False,
        **options: Unpack[GuidedTextOptions],
    ) -> Request:
        """Generate panoramas. Arguments shared with :class:`StableDiffusionPipeline` have the same meaning.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          height, width: in pixels; the checkpoint's default size if None.
          view_batch_size: windows that are computed at once: faster, and more memory.
          circular_padding: join left and right edge, for panoramas of 360 degrees.
          **options: see :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        request = super().compose(prompt, height=height, width=width, **options)
        return Windows(64, 8, view_batch_size, circular_padding)(request, self)
