"""unCLIP: images from prompts through the CLIP embedding of an image (Ramesh et al. 2022), as in Karlo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

from diffuse_jax.pipelines.combined import after, stage, with_seed
from diffuse_jax.pipelines.families.prior import given_text
from diffuse_jax.pipelines.families.unclip import UNCLIP_DECODER, UNCLIP_PRIOR, UNCLIP_SUPER_RESOLUTION
from diffuse_jax.pipelines.family import Family
from diffuse_jax.pipelines.inputs import Prompt, as_list
from diffuse_jax.pipelines.options import UnCLIPOptions, check_names
from diffuse_jax.pipelines.pipeline import DiffusionPipeline
from diffuse_jax.pipelines.running import Request
from diffuse_jax.schedulers import Scheduler


class UnCLIPPipeline(DiffusionPipeline):
    """Images from prompts: a prior makes an image embedding, a decoder a small image, two more networks a large one."""

    required: ClassVar[tuple[str, ...]] = (
        *("prior", "decoder", "text_encoder", "tokenizer", "text_proj", "super_res_first", "super_res_last"),
        *("prior_scheduler", "decoder_scheduler", "super_res_scheduler"),
    )
    family = UNCLIP_SUPER_RESOLUTION

    @property
    def scheduler(self) -> Scheduler:
        """That of the last stage; change one with ``pipe.replace(super_res_scheduler=...)``."""
        return self.components["super_res_scheduler"]

    def stage(self, family: Family, name: str, given: Mapping[str, Any], **own: Any) -> Request:
        """The request of one stage for the prompts of a call; see :func:`diffuse_jax.pipelines.combined.stage`."""
        text = given.get("text_model_output")
        return stage(self, family, name, len(given["prompt"] if text is None else text["pooled"]), given, **own)

    def compose(
        self,
        prompt: Prompt | None = None,
        *,
        prior_num_inference_steps: int = 25,
        decoder_num_inference_steps: int = 25,
        super_res_num_inference_steps: int = 7,
        prior_latents: Any = None,
        decoder_latents: Any = None,
        super_res_latents: Any = None,
        prior_guidance_scale: float | Sequence[float] = 4.0,
        decoder_guidance_scale: float | Sequence[float] = 8.0,
        text_model_output: Any = None,
        text_attention_mask: Any = None,
        **options: Unpack[UnCLIPOptions],
    ) -> Request:
        """Generate images. The first two stages run as soon as all arguments have been checked; the request is that of
        the super-resolution.

        Args:
          prompt: one prompt or a list; or give ``text_model_output``.
          prior_num_inference_steps, decoder_num_inference_steps, super_res_num_inference_steps: of each stage.
          prior_latents: standard normal noise ``[B,E]`` for the prior, instead of sampling it.
          decoder_latents, super_res_latents: the same for the others, ``[B,h,w,3]``.
          prior_guidance_scale, decoder_guidance_scale: one value, or one per image.
          text_model_output: what the text encoder returns for prompts that are padded to its length: an object or dict
            with ``text_embeds [N,E]`` and ``last_hidden_state [N,L,E]``, or both in this order.
          text_attention_mask: bool ``[N,L]`` for it, false at padding.
          **options: see :class:`~diffuse_jax.pipelines.options.UnCLIPOptions`.

        Raises:
          ValueError, TypeError: an argument is invalid or contradicts another one; nothing has been compiled.
        """
        check_names(type(self), options, UnCLIPOptions)
        given = with_seed(options, self.mesh)
        if text_model_output is None and text_attention_mask is None:
            given["prompt"] = as_list(prompt, "prompt")
        elif prompt is not None:
            raise ValueError("give prompt, or text_model_output and text_attention_mask, not both")
        else:
            given["text_model_output"] = given_text(self, text_model_output, text_attention_mask)
        first = {"num_inference_steps": prior_num_inference_steps, "latents": prior_latents}
        second = {"num_inference_steps": decoder_num_inference_steps, "latents": decoder_latents}
        third = {"num_inference_steps": super_res_num_inference_steps, "latents": super_res_latents}
        prior = self.stage(UNCLIP_PRIOR, "prior", given, guidance_scale=prior_guidance_scale, **first)
        decoder = self.stage(UNCLIP_DECODER, "decoder", given, guidance_scale=decoder_guidance_scale, **second)
        large = self.stage(UNCLIP_SUPER_RESOLUTION, "super_res", given, **third)
        return after(large, self, after(decoder, self, prior))
