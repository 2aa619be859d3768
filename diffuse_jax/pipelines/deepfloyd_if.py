"""DeepFloyd IF, first stage: images of 64 pixels from prompts, from an image, or inside a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.pipelines.families.clip import NEGATIVE, POSITIVE, encode_ids
from diffuse_jax.pipelines.families.deepfloyd_if import DEEPFLOYD_IF
from diffuse_jax.pipelines.family import Call, output_size
from diffuse_jax.pipelines.inputs import ImageInput, Prompt, as_list
from diffuse_jax.pipelines.options import PixelTextOptions
from diffuse_jax.pipelines.pipeline import DiffusionPipeline
from diffuse_jax.pipelines.pixel_tasks import checked_channels, fitted_size, from_pixels, pixel_request, repainted
from diffuse_jax.pipelines.running import Request, apply
from diffuse_jax.pipelines.safety import SETTING


class PromptEmbeds(NamedTuple):
    """What :meth:`IFPipeline.encode_prompt` returns, each ``[B,77,D]``; ``negative_prompt_embeds`` may be None."""

    prompt_embeds: jax.Array
    negative_prompt_embeds: jax.Array | None


class IFPipeline(DiffusionPipeline):
    """Images of 64 pixels from prompts; the base of IF's other pipelines.

    ``text_encoder`` and ``tokenizer`` are optional: calls also take what :meth:`encode_prompt` returns.
    """

    required: ClassVar[tuple[str, ...]] = ("unet", "scheduler")
    settings: ClassVar[Mapping[str, str]] = SETTING
    family = DEEPFLOYD_IF

    def compose(
        self,
        prompt: Prompt | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | Sequence[float] = 7.0,
        **options: Unpack[PixelTextOptions],
    ) -> Request:
        """Generate images, in 100 steps by default.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          height, width: in pixels; the checkpoint's default size (64) if None.
          guidance_scale: one value or one per image; 1 or less turns guidance off.
          **options: see :class:`~diffuse_jax.pipelines.options.PixelTextOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
        request = pixel_request(self, arguments, output_size(self, height, width), 100)
        return checked_channels(self, request)

    def encode_prompt(
        self,
        prompt: Prompt,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        *,
        negative_prompt: Prompt | None = None,
        clean_caption: bool = False,
    ) -> PromptEmbeds:
        """The embeddings of prompts, for calls of every stage: ``stage_2(**embeds._asdict(), image=...)``.

        Args:
          prompt: one prompt or a list.
          do_classifier_free_guidance: also encode the negative prompts.
          num_images_per_prompt: rows for each prompt.
          negative_prompt: one, or one per prompt; empty if None.
          clean_caption: as in a call.

        Raises:
          ValueError: the pipeline has no ``text_encoder`` or ``tokenizer``, or the number of prompts does not match.
        """
        if self.components.get("text_encoder") is None or self.components.get("tokenizer") is None:
            raise ValueError("encode_prompt needs a text_encoder and a tokenizer, and this pipeline has none")
        given = {"prompt": prompt, "negative_prompt": negative_prompt, "clean_caption": clean_caption}
        call = Call(given, len(as_list(prompt, "prompt")), 1, (0, 0))
        branches = (POSITIVE, NEGATIVE) if do_classifier_free_guidance else (POSITIVE,)
        tokens = [self.family.tokens(self, self.family.prompts(call, branch)) for branch in branches]
        rows = jax.tree.map(lambda *arrays: np.concatenate(arrays), *tokens)  # T5 is on the device once for both
        states = apply(self, encode_ids, self.family.text_part(self), rows)["states"]
        positive, *negative = jnp.split(jnp.repeat(states, num_images_per_prompt, axis=0), len(branches))
        return PromptEmbeds(positive, negative[0] if negative else None)


class IFImg2ImgPipeline(IFPipeline):
    """Images of 64 pixels from prompts and an image that sets composition and colours."""

    def compose(  # type: ignore[override]
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        *,
        strength: float = 0.7,
        guidance_scale: float | Sequence[float] = 10.0,
        **options: Unpack[PixelTextOptions],
    ) -> Request:
        """Change an image, in 80 steps (of which ``strength`` says how many are run) by default.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          image: the image, or one per prompt; a PIL image is resized, so that its shorter side is 64 pixels.
          strength: in (0, 1], how much the image is changed.
          guidance_scale, options: as in :class:`IFPipeline`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
        request = pixel_request(self, arguments, fitted_size(self, image, "image"), 80, strength=strength)
        return checked_channels(self, from_pixels(request, image, "image"))


class IFInpaintingPipeline(IFPipeline):
    """Repaints part of an image of 64 pixels from a prompt."""

    def compose(  # type: ignore[override]
        self,
        prompt: Prompt | None = None,
        image: ImageInput = None,
        mask_image: ImageInput = None,
        *,
        strength: float = 1.0,
        guidance_scale: float | Sequence[float] = 7.0,
        **options: Unpack[PixelTextOptions],
    ) -> Request:
        """Repaint the white part of ``mask_image``, in 50 steps by default; the rest is not changed.

        Args:
          prompt, image, strength, guidance_scale, options: as in :class:`IFImg2ImgPipeline`.
          mask_image: the mask, or one per prompt; white (at least 0.5) is repainted.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        arguments = {"prompt": prompt, "guidance_scale": guidance_scale, **options}
        request = pixel_request(self, arguments, fitted_size(self, image, "image"), 50, strength=strength)
        return checked_channels(self, repainted(request, image, mask_image, "image"))
