"""Stable Diffusion XL with T2I-Adapters: text to image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Unpack

from diffuse_jax.pipelines.inputs import ImageInput, Prompt
from diffuse_jax.pipelines.options import AdapterOptions, XLAdapterTextOptions, split_options
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from diffuse_jax.pipelines.t2i_adapters import adapter_size, steered


class StableDiffusionXLAdapterPipeline(StableDiffusionXLPipeline):
    """Images from prompts and control images. ``adapter`` is one network or several."""

    required: ClassVar[tuple[str, ...]] = (*StableDiffusionXLPipeline.required, "adapter")
    settings: ClassVar[Mapping[str, str]] = {"force_zeros_for_empty_prompt": "honoured"}

    def compose(
        self,
        prompt: Prompt | None = None,
        prompt_2: Prompt | None = None,
        image: ImageInput = None,
        *,
        height: int | None = None,
        width: int | None = None,
        **options: Unpack[XLAdapterTextOptions],
    ) -> Request:
        """Generate images. Arguments shared with :class:`StableDiffusionXLPipeline` have the same meaning.

        Args:
          prompt, prompt_2: for the two text encoders.
          image: the control image, or one per prompt. With several adapters, a list with the image (or the list of one
            per prompt) of each.
          height, width: in pixels; the control image's size, rounded down to what the adapter takes, if None.
          **options: see :class:`~diffuse_jax.pipelines.options.AdapterOptions` and
            :class:`~diffuse_jax.pipelines.options.XLOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        control, others = split_options(options, AdapterOptions)
        height, width = adapter_size(self, image, height, width)
        return steered(super().compose(prompt, prompt_2, height=height, width=width, **others), self, image, control)
