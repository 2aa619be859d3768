"""Self-attention guidance (Hong et al. 2023, arXiv 2210.00939) with Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.inputs import Prompt
from diffuse_jax.pipelines.modifiers.perturbation import SelfAttentionGuidance
from diffuse_jax.pipelines.options import GuidedTextOptions
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline


class StableDiffusionSAGPipeline(StableDiffusionPipeline):
    """Images from prompts, with guidance away from a sample that is blurred where the network looks."""

    sampler_settings: ClassVar[Mapping[str, Any]] = {}

    def compose(
        self,
        prompt: Prompt | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        sag_scale: float | Sequence[float] = 0.75,
        **options: Unpack[GuidedTextOptions],
    ) -> Request:
        """Generate images. Arguments shared with :class:`StableDiffusionPipeline` have the same meaning.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          height, width: in pixels; the checkpoint's default size if None.
          sag_scale: strength of self-attention guidance, one value or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        request = super().compose(prompt, height=height, width=width, **options)
        return SelfAttentionGuidance(sag_scale)(request, self)
