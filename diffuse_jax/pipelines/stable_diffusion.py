"""Stable Diffusion 1.x and 2.x: text to image (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from diffuse_jax.models.base import Params
from diffuse_jax.pipelines.base import DiffusionPipeline
from diffuse_jax.pipelines.prompts import Prompt, number_of_prompts, one_per_prompt, tokenize
from diffuse_jax.pipelines.run import ImagePipelineOutput, Job, StepCallback, compile_job, make_batch, run_job
from diffuse_jax.pipelines.task import Encoders, check_size, guides, make_task, text_of
from diffuse_jax.pipelines.text_to_image import Prompts, Text


class StableDiffusionPipeline(DiffusionPipeline):
    """Pictures from prompts with one CLIP text encoder."""

    required: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    def __call__(
        self,
        prompt: Prompt | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | Sequence[float] = 7.5,
        negative_prompt: Prompt | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        seed: int | Sequence[int] | None = None,
        key: jax.Array | None = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        output_type: str = "pil",
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        progress_bar: bool = False,
        batch_size: int | None = None,
        compile_only: bool = False,
    ) -> ImagePipelineOutput | None:
        """Make pictures.

        Args:
          prompt: one prompt or a list; or give ``prompt_embeds``.
          height, width: in pixels, multiples of 8; what the checkpoint was trained for if None.
          num_inference_steps: 50 if neither ``timesteps`` nor ``sigmas`` say otherwise.
          timesteps, sigmas: the sampler's grid itself, descending.
          guidance_scale: of classifier-free guidance, one or one per picture. Above 1 the network runs on a doubled
            batch; up to 1 it runs once, which is a program of its own.
          negative_prompt: one, or one per prompt; empty if None.
          num_images_per_prompt: pictures per prompt; those of one prompt follow each other.
          eta: noise of DDIM, 0 to 1 (other samplers refuse it).
          seed: an int from 0 to 2**32 - 1, or a list with one per picture; drawn by the system if None.
          key: a typed ``jax.random`` key instead of a seed.
          latents: ``[B,h,w,c]`` standard normal noise to start from, instead of drawing it.
          prompt_embeds, negative_prompt_embeds: ``[prompts,L,D]`` text states instead of prompts.
          output_type: "pil", "np" or "latent"; see :class:`ImagePipelineOutput`.
          guidance_rescale: 0 to 1, see Lin et al. 2024, section 3.4.
          clip_skip: take the text states before the last ``clip_skip`` layers.
          callback_on_step_end: called after each evaluation; the program is then run step by step.
          progress_bar: show one; likewise.
          batch_size: most pictures at once; all if None.
          compile_only: compile the program and return None; see :meth:`compile`.

        Raises:
          ValueError, TypeError: an argument is impossible or contradicts another one; nothing has been compiled.
        """
        prompts = number_of_prompts(prompt, prompt_embeds, num_images_per_prompt)
        height, width = check_size(self, height, width)
        guided = guides(self, guidance_scale)
        repeat = lambda p: jax.tree.map(lambda rows: np.repeat(rows, num_images_per_prompt, axis=0), p)
        positive = repeat(self._prompts(prompt, prompt_embeds, prompts, "prompt"))
        negative = repeat(self._prompts(negative_prompt, negative_prompt_embeds, prompts, "negative_prompt"))
        task = make_task(self, ENCODERS, encode, height, width, output_type, clip_skip)
        batch, seeds = make_batch(
            positive,
            negative if guided else None,
            prompts * num_images_per_prompt,
            guidance_scale,
            guidance_rescale,
            seed,
            key,
            latents,
            task.latent_shape,
        )
        plan = self.scheduler.plan(
            50 if num_inference_steps is None and timesteps is None and sigmas is None else num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            **({} if eta is None else {"eta": eta}),
        )
        job = Job(task, batch, plan, prompts * num_images_per_prompt, seeds)
        if compile_only:
            compile_job(self, job, batch_size)
            return None
        return run_job(
            self, job, output_type, batch_size=batch_size, callback=callback_on_step_end, progress_bar=progress_bar
        )

    def compile(self, prompt: Prompt = "", **arguments: Any) -> StableDiffusionPipeline:
        """Compile the program that a call with these arguments would run; only their shapes matter. Returns self."""
        self(prompt, **arguments, compile_only=True)
        return self

    def _prompts(self, prompt: Prompt | None, embeds: Any, prompts: int, name: str) -> Prompts:
        if embeds is not None:
            return Prompts(text=text_of(embeds, None, prompts, name))
        tokenizer, encoder = self.components["tokenizer"], self.components["text_encoder"]
        texts = one_per_prompt(prompt, prompts, name)
        return Prompts(ids={"text_encoder": tokenize(tokenizer, texts, encoder.config.max_position_embeddings)})


ENCODERS = ("text_encoder",)


def encode(encoders: Encoders, params: dict[str, Params], ids: dict[str, jax.Array], clip_skip: int | None) -> Text:
    """The encoder's normalised last states, or with ``clip_skip`` the normalised states of an earlier layer."""
    ((name, encoder),) = encoders
    variables = {"params": params[name]}
    out = encoder.apply(variables, ids[name])
    if clip_skip is None:
        return Text(out.last_hidden_state)
    return Text(encoder.apply(variables, out.skipped(clip_skip), method="final_norm"))
