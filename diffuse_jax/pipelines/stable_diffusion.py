"""Stable Diffusion 1.x and 2.x: text to image (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import jax

from diffuse_jax.models.base import Params
from diffuse_jax.pipelines.call import CallOptions, TextToImagePipeline, check_options, generate
from diffuse_jax.pipelines.prompts import Prompt, number_of_prompts, one_per_prompt, tokenize
from diffuse_jax.pipelines.run import ImagePipelineOutput
from diffuse_jax.pipelines.task import Encoders, text_of
from diffuse_jax.pipelines.text_to_image import Prompts, Text


class StableDiffusionPipeline(TextToImagePipeline):
    """Pictures from prompts with one CLIP text encoder."""

    required: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    def __call__(
        self,
        prompt: Prompt | None = None,
        *,
        negative_prompt: Prompt | None = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        guidance_scale: float | Sequence[float] = 7.5,
        **options: Unpack[CallOptions],
    ) -> ImagePipelineOutput | None:
        """Make pictures.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          negative_prompt: one, or one per prompt; empty if None.
          prompt_embeds, negative_prompt_embeds: ``[prompts,L,D]`` text states instead of prompts.
          guidance_scale: of classifier-free guidance, one or one per picture. Above 1 the network runs on a doubled
            batch; up to 1 it runs once, which is a program of its own.
          **options: size, steps, seed and everything else: see :class:`~diffuse_jax.pipelines.call.CallOptions`.

        Raises:
          ValueError, TypeError: an argument is impossible or contradicts another one; nothing has been compiled.
        """
        check_options(self, options)
        prompts = number_of_prompts(prompt, prompt_embeds, options.get("num_images_per_prompt", 1))
        positive = self._prompts(prompt, prompt_embeds, prompts, "prompt")
        negative = self._prompts(negative_prompt, negative_prompt_embeds, prompts, "negative_prompt")
        return generate(self, ENCODERS, encode, (positive, negative), guidance_scale, options)

    def _prompts(self, prompt: Prompt | None, embeds: Any, prompts: int, name: str) -> Prompts:
        if embeds is not None:
            return Prompts(text=text_of([prompt], embeds, None, prompts, name))
        tokenizer, config = self.components["tokenizer"], self.components["text_encoder"].config
        texts = one_per_prompt(prompt, prompts, name)
        ids = tokenize(tokenizer, texts, config.max_position_embeddings, config.vocab_size)
        return Prompts(ids={"text_encoder": ids})


ENCODERS = ("text_encoder",)


def encode(encoders: Encoders, params: dict[str, Params], ids: dict[str, jax.Array], clip_skip: int | None) -> Text:
    """The encoder's normalised last states, or with ``clip_skip`` the normalised states of an earlier layer."""
    ((name, encoder),) = encoders
    variables = {"params": params[name]}
    out = encoder.apply(variables, ids[name])
    if clip_skip is None:
        return Text(out.last_hidden_state)
    return Text(encoder.apply(variables, out.skipped(clip_skip), method="final_norm"))
