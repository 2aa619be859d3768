"""Stable Diffusion 1.x and 2.x with T2I-Adapters (Mou et al. 2023): text to image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import AdapterOptions, AdapterTextOptions, split_options
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from diffuse_jax.pipelines.t2i_adapters import adapter_size, steered


class StableDiffusionAdapterPipeline(StableDiffusionPipeline):
    """Images from prompts and control images (sketches, colours, poses). ``adapter`` is one network or several."""

    required: ClassVar[tuple[str, ...]] = (*StableDiffusionPipeline.required, "adapter")
    sampler_settings: ClassVar[Mapping[str, Any]] = {}

    def compose(
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        *,
        height: int | None = None,
        width: int | None = None,
        **options: Unpack[AdapterTextOptions],
    ) -> Request:
        """Generate images. Arguments shared with :class:`StableDiffusionPipeline` have the same meaning.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          image: the control image, or one per prompt. With several adapters, a list with the image (or the list of one
            per prompt) of each.
          height, width: in pixels; the control image's size, rounded down to what the adapter takes, if None.
          **options: see :class:`~diffuse_jax.pipelines.options.AdapterOptions` and
            :class:`~diffuse_jax.pipelines.options.TextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        control, others = split_options(options, AdapterOptions)
        height, width = adapter_size(self, image, height, width)
        return steered(super().compose(prompt, height=height, width=width, **others), self, image, control)
