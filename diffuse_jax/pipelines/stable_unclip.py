"""Stable unCLIP: images from prompts by way of the CLIP embedding of an image (Ramesh et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.combined import after, stage, with_seed
from diffuse_jax.pipelines.families.stable_unclip import STABLE_UNCLIP, STABLE_UNCLIP_PRIOR
from diffuse_jax.pipelines.family import default_steps, output_size, text_to_image
from diffuse_jax.pipelines.inputs import Prompt
from diffuse_jax.pipelines.options import StableUnCLIPOptions
from diffuse_jax.pipelines.pipeline import DiffusionPipeline
from diffuse_jax.pipelines.running import Request

STEPS = 20
TO_BOTH = ("seed", "key", "num_images_per_prompt")


class StableUnCLIPPipeline(DiffusionPipeline):
    """Images from prompts: a prior makes the embedding of an image, and Stable Diffusion an image of both."""

    required: ClassVar[tuple[str, ...]] = (
        *("prior_tokenizer", "prior_text_encoder", "prior", "prior_scheduler"),
        *("image_normalizer", "image_noising_scheduler", "tokenizer", "text_encoder", "unet", "scheduler", "vae"),
    )
    family = STABLE_UNCLIP

    def compose(
        self,
        prompt: Prompt | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | Sequence[float] = 10.0,
        prior_num_inference_steps: int = 25,
        prior_guidance_scale: float | Sequence[float] = 4.0,
        prior_latents: Any = None,
        **options: Unpack[StableUnCLIPOptions],
    ) -> Request:
        """Generate images, in 20 steps by default. The prior runs as soon as all arguments have been checked; the
        request is that of Stable Diffusion. Arguments shared with :class:`StableDiffusionPipeline` have the same
        meaning.

        Args:
          prompt: one prompt or a list; both stages encode it.
          height, width: in pixels; the checkpoint's default size if None.
          guidance_scale: one value, or one per image. It leads away from the negative prompt without an image.
          prior_num_inference_steps: of the prior.
          prior_guidance_scale: of the prior, one value, or one per image.
          prior_latents: standard normal noise ``[B,E]`` for the prior, instead of sampling it.
          **options: see :class:`~diffuse_jax.pipelines.options.StableUnCLIPOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        if prompt is None:
            raise ValueError("StableUnCLIPPipeline needs prompt: prompt_embeds are of one encoder, and it has two")
        given = with_seed(options, self.mesh)
        size = output_size(self, height, width)
        second = {**default_steps(given, STEPS), "prompt": prompt, "guidance_scale": guidance_scale}
        request = text_to_image(self, second, size)
        prior = stage(
            self,
            STABLE_UNCLIP_PRIOR,
            "prior",
            request.images // request.copies,
            {name: given.get(name) for name in TO_BOTH} | {"prompt": prompt},
            num_inference_steps=prior_num_inference_steps,
            guidance_scale=prior_guidance_scale,
            latents=prior_latents,
        )
        return after(request, self, prior)
