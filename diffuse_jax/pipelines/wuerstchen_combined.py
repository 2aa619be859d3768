"""Both stages of Würstchen as one pipeline (Pernias et al. 2023, arXiv 2306.00637)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import numpy as np

from diffuse_jax.messages import renaming
from diffuse_jax.pipelines.combined import Combined, only_checks, prefixed
from diffuse_jax.pipelines.families.wuerstchen import with_maps
from diffuse_jax.pipelines.inputs import Prompt
from diffuse_jax.pipelines.options import WuerstchenCombinedOptions, check_names
from diffuse_jax.pipelines.running import Request, StepCallback, check_callback, run
from diffuse_jax.pipelines.wuerstchen_decoder import WuerstchenDecoderPipeline
from diffuse_jax.pipelines.wuerstchen_prior import WuerstchenPriorPipeline
from diffuse_jax.sharding import readable

TEXT = ("negative_prompt", "num_images_per_prompt", "prompt_syntax", "long_prompts")
NOISE = ("seed", "key", "noise")


class WuerstchenCombinedPipeline(Combined, WuerstchenDecoderPipeline):
    """Images from prompts. The prior's components have names that begin with ``prior_``.

    A request runs the prior: the maps are data of the second stage.
    """

    required: ClassVar[tuple[str, ...]] = (
        *WuerstchenDecoderPipeline.required,
        *prefixed(WuerstchenPriorPipeline.required),
    )
    prior = WuerstchenPriorPipeline
    decoder = WuerstchenDecoderPipeline
    settings: ClassVar[Mapping[str, str]] = {
        **WuerstchenPriorPipeline.settings,
        **WuerstchenDecoderPipeline.settings,
    }

    def compose(  # type: ignore[override]
        self,
        prompt: Prompt | None = None,
        *,
        height: int = 512,
        width: int = 512,
        prior_num_inference_steps: int = 60,
        prior_timesteps: Sequence[float] | None = None,
        prior_guidance_scale: float | Sequence[float] = 4.0,
        num_inference_steps: int = 12,
        decoder_timesteps: Sequence[float] | None = None,
        decoder_guidance_scale: float | Sequence[float] = 0.0,
        prior_callback_on_step_end: StepCallback | None = None,
        **options: Unpack[WuerstchenCombinedOptions],
    ) -> Request:
        """Generate images.

        Args:
          prompt: one prompt or a list, for both stages; or give ``prompt_embeds`` for the prior, and the decoder gets
            the empty prompt.
          height, width: in pixels, about: maps have whole pixels.
          prior_num_inference_steps, num_inference_steps: steps of either stage.
          prior_timesteps, decoder_timesteps: times from 1 to 0 instead.
          prior_guidance_scale, decoder_guidance_scale: one value or one per image; guidance is off if none is above 1.
          prior_callback_on_step_end: as ``callback_on_step_end``, for the prior.
          **options: see :class:`~diffuse_jax.pipelines.options.WuerstchenCombinedOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        check_names(type(self), options, WuerstchenCombinedOptions)
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        pick = lambda *names: {name: given[name] for name in names if name in given}
        steps = lambda count, times: {"num_inference_steps": count} if times is None else {"timesteps": times}
        check_callback(prior_callback_on_step_end, "prior_callback_on_step_end")
        prior, text = self.prior_pipe, pick(*TEXT, "output_type")
        text.pop("num_images_per_prompt", None)
        with renaming({name: f"prior_{name}" for name in ("num_inference_steps", "timesteps", "guidance_scale")}):
            first = prior.request(
                prompt,
                height=height,
                width=width,
                guidance_scale=prior_guidance_scale,
                **steps(prior_num_inference_steps, prior_timesteps),
                **pick(*TEXT, *NOISE, "prompt_embeds", "negative_prompt_embeds", "latents"),
            )
        with renaming({name: f"decoder_{name}" for name in ("timesteps", "guidance_scale")}):
            second = super().compose(
                np.zeros((first.images, *first.method.latent_shape), np.float32),
                "" if prompt is None else prompt,
                guidance_scale=decoder_guidance_scale,
                **steps(num_inference_steps, decoder_timesteps),
                **text,
                **(pick("key") or {"seed": first.seeds}),
            )
        if only_checks(prior):
            return second
        maps = run(prior, first, callback_on_step_end=prior_callback_on_step_end).image_embeddings
        return with_maps(second, np.asarray(readable(maps)))
