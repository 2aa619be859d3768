"""The prior of Kandinsky 2.2: from a prompt to the embedding of an image (Razzhigaev et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import numpy as np

from diffuse_jax.messages import brief
from diffuse_jax.pipelines.families.prior import PRIOR
from diffuse_jax.pipelines.inputs import Prompt, finite
from diffuse_jax.pipelines.options import PriorOptions
from diffuse_jax.pipelines.pipeline import DiffusionPipeline
from diffuse_jax.pipelines.priors import image_embeddings, prior_request, seen_image
from diffuse_jax.pipelines.running import Output, Request


class KandinskyV22PriorPipeline(DiffusionPipeline):
    """Embeddings of images for the decoders of Kandinsky 2.2: ``image_embeds`` and ``negative_image_embeds``."""

    required: ClassVar[tuple[str, ...]] = (
        *("prior", "image_encoder", "text_encoder", "tokenizer", "scheduler", "image_processor"),
    )
    family = PRIOR

    def compose(
        self,
        prompt: Prompt | None = None,
        *,
        guidance_scale: float | Sequence[float] = 4.0,
        **options: Unpack[PriorOptions],
    ) -> Request:
        """Generate embeddings, in 25 steps by default. Arguments shared with :class:`StableDiffusionPipeline` have the
        same meaning.

        Args:
          prompt: one prompt or a list.
          guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.PriorOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        return prior_request(self, {"prompt": prompt, "guidance_scale": guidance_scale, **options})

    def interpolate(
        self,
        images_and_prompts: Sequence[Any],
        weights: Sequence[float],
        *,
        negative_prompt: str = "",
        negative_prior_prompt: str | None = None,
        **options: Any,
    ) -> Output:
        """A weighted sum of embeddings: of prompts through the prior, of images through the image encoder.

        Args:
          images_and_prompts: strings, and images of any size.
          weights: one number for each of them.
          negative_prompt: the prompt of the negative embedding; that of an empty image if empty.
          negative_prior_prompt: the negative prompt of all runs of the prior.
          **options: further arguments of a call: ``num_images_per_prompt``, ``num_inference_steps``,
            ``guidance_scale``, ``seed`` ... Every prompt starts from the same noise.

        Returns:
          The output of a call, ``image_embeds`` and ``negative_image_embeds``.

        Raises:
          ValueError, TypeError: there is not one weight for each of them, or an argument is invalid.
        """
        if not isinstance(images_and_prompts, list | tuple):
            raise TypeError(f"images_and_prompts must be a list of images and prompts, got {brief(images_and_prompts)}")
        given = finite(weights, "weights").astype(np.float32)
        if given.shape != (len(images_and_prompts),) or not len(given):
            raise ValueError(
                f"give one weight for each image or prompt; got {given.size} weights for {len(images_and_prompts)}"
            )
        prior = lambda prompt: self(prompt, negative_prompt=negative_prior_prompt, **options)
        seen = [entry if isinstance(entry, str) else seen_image(self, entry) for entry in images_and_prompts]
        negative, images = prior(negative_prompt), options.get("num_images_per_prompt", 1)
        each = (
            prior(entry).image_embeds if isinstance(entry, str) else image_embeddings(self, entry, images)
            for entry in seen
        )
        total = sum(weight * embeds for weight, embeds in zip(given, each, strict=True))
        without = negative.image_embeds if negative_prompt else negative.negative_image_embeds
        return Output({"image_embeds": total, "negative_image_embeds": without}, negative.seeds)
