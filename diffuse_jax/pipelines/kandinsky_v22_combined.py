"""Kandinsky 2.2, prior and decoder in one: images from prompts (Razzhigaev et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import numpy as np

from diffuse_jax.messages import renaming
from diffuse_jax.pipelines.combined import Combined, after_prior, prefixed, with_seed
from diffuse_jax.pipelines.family import one_width
from diffuse_jax.pipelines.inputs import ImageInput, Prompt, as_list
from diffuse_jax.pipelines.kandinsky_v22 import KandinskyV22Pipeline
from diffuse_jax.pipelines.kandinsky_v22_img2img import KandinskyV22Img2ImgPipeline
from diffuse_jax.pipelines.kandinsky_v22_inpaint import KandinskyV22InpaintPipeline
from diffuse_jax.pipelines.kandinsky_v22_prior import KandinskyV22PriorPipeline
from diffuse_jax.pipelines.options import CombinedOptions, argument_names, check_names
from diffuse_jax.pipelines.pipeline import DiffusionPipeline
from diffuse_jax.pipelines.running import Request, check_callback

TO_PRIOR = {"prior_num_inference_steps": "num_inference_steps", "prior_guidance_scale": "guidance_scale"}
"""Argument of a combined pipeline -> of the prior."""

TO_BOTH = ("seed", "key", "num_images_per_prompt")


class KandinskyV22CombinedPipeline(Combined, DiffusionPipeline):
    """Images from prompts: :attr:`prior_pipe` makes embeddings, :attr:`decoder_pipe` makes images of them."""

    required: ClassVar[tuple[str, ...]] = (
        *KandinskyV22Pipeline.required,
        *prefixed(KandinskyV22PriorPipeline.required),
    )
    prior = KandinskyV22PriorPipeline
    decoder: ClassVar[type[DiffusionPipeline]] = KandinskyV22Pipeline

    def compose(
        self,
        prompt: Prompt | None = None,
        *,
        height: int = 512,
        width: int = 512,
        guidance_scale: float | Sequence[float] = 4.0,
        **options: Unpack[CombinedOptions],
    ) -> Request:
        """Generate images. The prior runs as soon as all arguments have been checked; the request is the decoder's.

        Args:
          prompt: one prompt or a list.
          height, width: in pixels, rounded up to a multiple of 64.
          guidance_scale: of the decoder; one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.CombinedOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        return self.composed(prompt, {"height": height, "width": width, "guidance_scale": guidance_scale}, options)

    def composed(self, prompt: Prompt | None, decoding: Mapping[str, Any], options: Mapping[str, Any]) -> Request:
        """The decoder's request after the prior's run, from arguments for the decoder alone and the others."""
        check_names(type(self), options, CombinedOptions)
        given = with_seed({name: value for name, value in options.items() if value is not None}, self.mesh)
        prior, decoder = self.prior_pipe, self.decoder_pipe
        callback = given.pop("prior_callback_on_step_end", None)
        first = {name: given[name] for name in TO_BOTH if name in given}
        second: dict[str, Any] = dict(first)
        first |= {TO_PRIOR[name]: given.pop(name) for name in TO_PRIOR if name in given}
        first |= {name: given.pop(name) for name in ("negative_prompt", "latents") if name in given}
        prompts = as_list(prompt, "prompt")
        blank = np.zeros((len(prompts), self.components["unet"].config.image_width), np.float32)
        second |= given | {"image_embeds": blank, "negative_image_embeds": blank, **decoding}
        second |= {"prompt": prompts} if "prompt" in argument_names(self.decoder) else {}
        request = type(decoder).compose(decoder, **second)
        with renaming({own: name for name, own in TO_PRIOR.items()}):
            run_first = prior.request(prompt, **first)
        one_width(self, {"unet": "image_width", "prior_prior": "embedding_dim"})
        check_callback(callback, "prior_callback_on_step_end")
        return after_prior(request, prior, run_first, callback_on_step_end=callback)


class KandinskyV22Img2ImgCombinedPipeline(KandinskyV22CombinedPipeline):
    """Images from prompts and an initial image."""

    decoder: ClassVar[type[DiffusionPipeline]] = KandinskyV22Img2ImgPipeline

    def compose(
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        *,
        strength: float = 0.3,
        height: int = 512,
        width: int = 512,
        guidance_scale: float | Sequence[float] = 4.0,
        **options: Unpack[CombinedOptions],
    ) -> Request:
        """Generate images. Arguments shared with :class:`KandinskyV22CombinedPipeline` have the same meaning.

        Args:
          prompt: one prompt or a list.
          image: the initial image, or one per prompt; or latents ``[B,h,w,c]``. It is resized to the output's size.
          strength: in (0, 1], how much the image is changed: the fraction of the decoder's steps that is run.
          height, width: in pixels, rounded up to a multiple of 64.
          guidance_scale: of the decoder; one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.CombinedOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        size = {"height": height, "width": width}
        decoding = {"image": image, "strength": strength, "guidance_scale": guidance_scale, **size}
        return self.composed(prompt, decoding, options)


class KandinskyV22InpaintCombinedPipeline(KandinskyV22CombinedPipeline):
    """Repaints the masked part of an image from prompts."""

    decoder: ClassVar[type[DiffusionPipeline]] = KandinskyV22InpaintPipeline

    def compose(
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        mask_image: ImageInput = None,
        *,
        height: int = 512,
        width: int = 512,
        guidance_scale: float | Sequence[float] = 4.0,
        **options: Unpack[CombinedOptions],
    ) -> Request:
        """Repaint. Arguments shared with :class:`KandinskyV22CombinedPipeline` have the same meaning.

        Args:
          prompt: one prompt or a list.
          image: the image, or one per prompt; or latents ``[B,h,w,c]``. It is resized to the output's size.
          mask_image: white where to repaint, or one per prompt.
          height, width: in pixels, rounded up to a multiple of 64.
          guidance_scale: of the decoder; one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.CombinedOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        size = {"height": height, "width": width}
        decoding = {"image": image, "mask_image": mask_image, "guidance_scale": guidance_scale, **size}
        return self.composed(prompt, decoding, options)
