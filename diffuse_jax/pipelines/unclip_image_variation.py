"""unCLIP: variations of an image, whose embedding the decoder takes in the place of the prior's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.combined import after, with_seed
from diffuse_jax.pipelines.families.unclip import UNCLIP_DECODER, UNCLIP_SUPER_RESOLUTION
from diffuse_jax.pipelines.inputs import ImageInput
from diffuse_jax.pipelines.options import UnCLIPOptions, check_names
from diffuse_jax.pipelines.priors import seen_images, with_images
from diffuse_jax.pipelines.running import Request
from diffuse_jax.pipelines.unclip import UnCLIPPipeline


class UnCLIPImageVariationPipeline(UnCLIPPipeline):
    """Images that resemble an image, which a CLIP vision encoder sees; there is no prompt."""

    required: ClassVar[tuple[str, ...]] = (
        *("decoder", "text_encoder", "tokenizer", "text_proj", "feature_extractor", "image_encoder"),
        *("super_res_first", "super_res_last", "decoder_scheduler", "super_res_scheduler"),
    )

    def compose(  # type: ignore[override]
        self,
        image: ImageInput = None,
        *,
        decoder_num_inference_steps: int = 25,
        super_res_num_inference_steps: int = 7,
        decoder_latents: Any = None,
        super_res_latents: Any = None,
        image_embeddings: Any = None,
        decoder_guidance_scale: float | Sequence[float] = 8.0,
        **options: Unpack[UnCLIPOptions],
    ) -> Request:
        """Generate variations. The decoder runs as soon as all arguments have been checked; the request is that of the
        super-resolution. Arguments shared with :class:`UnCLIPPipeline` have the same meaning.

        Args:
          image: one image of any size, or several.
          decoder_num_inference_steps, super_res_num_inference_steps: of each stage.
          decoder_latents, super_res_latents: standard normal noise ``[B,h,w,3]``, instead of sampling it.
          image_embeddings: embeddings ``[N,E]`` of the image encoder instead of images.
          decoder_guidance_scale: one value, or one per image.
          **options: see :class:`~diffuse_jax.pipelines.options.UnCLIPOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        check_names(type(self), options, UnCLIPOptions)
        name, array = seen_images(self, image, image_embeddings, "image_embeddings")
        given = with_seed(options, self.mesh) | {"prompt": [""] * len(array)}
        first = {"num_inference_steps": decoder_num_inference_steps, "latents": decoder_latents}
        second = {"num_inference_steps": super_res_num_inference_steps, "latents": super_res_latents}
        decoder = self.stage(UNCLIP_DECODER, "decoder", given, guidance_scale=decoder_guidance_scale, **first)
        large = self.stage(UNCLIP_SUPER_RESOLUTION, "super_res", given, **second)
        return after(large, self, with_images(decoder, self, name, array))
