"""Stable Diffusion XL: text to image with two text encoders and size conditions (Podell et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.models.base import Params
from diffuse_jax.pipelines.call import CallOptions, TextToImagePipeline, check_options, generate
from diffuse_jax.pipelines.prompts import Prompt, number_of_prompts, one_per_prompt, tokenize
from diffuse_jax.pipelines.run import ImagePipelineOutput
from diffuse_jax.pipelines.task import Encoders, check_size, text_of
from diffuse_jax.pipelines.text_to_image import Prompts, Text

Size = tuple[int, int]

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Text encoders in the order in which their states are joined, and whose tokenizer each uses."""


class StableDiffusionXLPipeline(TextToImagePipeline):
    """Pictures from prompts with CLIP-L and OpenCLIP bigG, told how large and how cropped the picture should look."""

    required: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder_2", "tokenizer_2", "scheduler")

    def __call__(
        self,
        prompt: Prompt | None = None,
        prompt_2: Prompt | None = None,
        *,
        negative_prompt: Prompt | None = None,
        negative_prompt_2: Prompt | None = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        guidance_scale: float | Sequence[float] = 5.0,
        denoising_end: float | None = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        **options: Unpack[CallOptions],
    ) -> ImagePipelineOutput | None:
        """Make pictures. Arguments that :class:`StableDiffusionPipeline` has too mean the same here.

        Args:
          prompt_2, negative_prompt_2: prompts of the second encoder; those of the first if None.
          negative_prompt: if None, the unconditional text is all zeros where the checkpoint says so
            (``force_zeros_for_empty_prompt``), and the empty prompt otherwise.
          prompt_embeds, pooled_prompt_embeds: ``[prompts,L,2048]`` and ``[prompts,1280]``, together; likewise the
            negative ones.
          denoising_end: share in (0, 1) of the schedule after which to stop, for a refiner to go on; use it with
            ``output_type="latent"``.
          original_size, target_size: (height, width) in pixels, those of the picture if None.
          crops_coords_top_left: (top, left) in pixels.
          negative_original_size, negative_crops_coords_top_left, negative_target_size: what the unconditional half is
            told; the sizes are those of the positive half unless both are given.
          **options: see :class:`~diffuse_jax.pipelines.call.CallOptions`.

        Raises:
          ValueError, TypeError: an argument is impossible or contradicts another one; nothing has been compiled.
        """
        check_options(self, options)
        prompts = number_of_prompts(prompt, prompt_embeds, options.get("num_images_per_prompt", 1))
        size = check_size(self, options.get("height"), options.get("width"))
        for pair in (original_size, target_size, crops_coords_top_left, negative_original_size, negative_target_size,
                     negative_crops_coords_top_left):  # fmt: skip
            if pair is not None and np.shape(pair) != (2,):
                raise ValueError(f"sizes are (height, width) and crops (top, left) in pixels, got {pair!r}")
        own = original_size or size, crops_coords_top_left, target_size or size
        apart = negative_original_size is not None and negative_target_size is not None
        other = (negative_original_size, negative_crops_coords_top_left, negative_target_size) if apart else own
        zeros = negative_prompt is None and bool(self.options.get("force_zeros_for_empty_prompt", True))

        positive = self._prompts((prompt, prompt_2), prompt_embeds, pooled_prompt_embeds, prompts, "prompt")
        negative = self._prompts(
            (negative_prompt, negative_prompt_2),
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
            prompts,
            "negative_prompt",
        )
        keep = 0.0 if zeros and negative_prompt_embeds is None else 1.0
        told = lambda sizes: np.tile(np.array([n for pair in sizes for n in pair], np.float32), (prompts, 1))
        both = (
            positive._replace(time_ids=told(own)),
            negative._replace(time_ids=told(other), weight=np.full(prompts, keep, np.float32)),
        )
        return generate(self, tuple(ENCODERS), encode, both, guidance_scale, options, denoising_end=denoising_end)

    def _prompts(
        self, texts: tuple[Prompt | None, Prompt | None], embeds: Any, pooled: Any, prompts: int, name: str
    ) -> Prompts:
        """Token ids for each encoder there is (the refiner has only the second), or what the caller encoded."""
        if (embeds is None) != (pooled is None):
            raise ValueError(f"give {name}_embeds and its pooled embeddings together")
        if embeds is not None:
            return Prompts(text=text_of(texts, embeds, pooled, prompts, name))
        first, second = texts
        ids = {}
        for text, (encoder, tokenizer) in zip(
            (first, first if second is None else second), ENCODERS.items(), strict=True
        ):
            if self.components.get(encoder) is not None:
                config = self.components[encoder].config
                limits = config.max_position_embeddings, config.vocab_size
                ids[encoder] = tokenize(self.components[tokenizer], one_per_prompt(text, prompts, name), *limits)
        return Prompts(ids=ids)


def encode(encoders: Encoders, params: dict[str, Params], ids: dict[str, jax.Array], clip_skip: int | None) -> Text:
    """States before the last layer (or before ``clip_skip`` more), not normalised, side by side; pooled of the last."""
    outputs = [encoder.apply({"params": params[name]}, ids[name]) for name, encoder in encoders]
    states = [out.skipped(1 if clip_skip is None else clip_skip + 1) for out in outputs]
    return Text(jnp.concatenate(states, -1), outputs[-1].text_embeds)
