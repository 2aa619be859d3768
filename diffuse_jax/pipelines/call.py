"""A text-to-image call from prompts that are arrays to pictures: the part that all such pipelines share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from diffuse_jax.adapters import tokens
from diffuse_jax.adapters.lora import merge
from diffuse_jax.adapters.lora_file import load_lora
from diffuse_jax.pipelines.base import DiffusionPipeline
from diffuse_jax.pipelines.prompts import Prompt, one_per_image
from diffuse_jax.pipelines.run import ImagePipelineOutput, Job, StepCallback, compile_job, make_draws, run_job
from diffuse_jax.pipelines.task import check_lengths, check_size, guides, make_task
from diffuse_jax.pipelines.text_to_image import Batch, Prompts, Text

STEPS = 50


class CallOptions(TypedDict, total=False):
    """Arguments that every text-to-image call takes beside its prompts.

    Attributes:
      height, width: in pixels, multiples of the autoencoder's scale (8); what the checkpoint was trained for if None.
      num_inference_steps: 50 if neither ``timesteps`` nor ``sigmas`` say otherwise.
      timesteps, sigmas: the sampler's grid itself, descending.
      num_images_per_prompt: pictures per prompt, 1 by default; those of one prompt follow each other.
      eta: noise of DDIM, 0 to 1 (other samplers refuse it).
      seed: an int from 0 to 2**32 - 1, or a list with one per picture; drawn by the system if None.
      key: a typed ``jax.random`` key instead of a seed.
      latents: ``[B,h,w,c]`` standard normal noise to start from, instead of drawing it.
      output_type: "pil" (default), "np" or "latent"; see :class:`ImagePipelineOutput`.
      guidance_rescale: 0 (default) to 1, see Lin et al. 2024, section 3.4.
      clip_skip: take the text states before the last ``clip_skip`` layers.
      callback_on_step_end: called after each evaluation; the program is then run step by step.
      progress_bar: show one; likewise.
      batch_size: most pictures at once; all if None.
      compile_only: compile the program and return None; see :meth:`TextToImagePipeline.compile`.
    """

    height: int | None
    width: int | None
    num_inference_steps: int | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    num_images_per_prompt: int
    eta: float | None
    seed: int | Sequence[int] | None
    key: jax.Array | None
    latents: Any
    output_type: str
    guidance_rescale: float
    clip_skip: int | None
    callback_on_step_end: StepCallback | None
    progress_bar: bool
    batch_size: int | None
    compile_only: bool


class TextToImagePipeline(DiffusionPipeline):
    """Base of the pipelines that make pictures from prompts; their ``__call__`` ends in :func:`generate`."""

    def compile(self, prompt: Prompt = "", **arguments: Any) -> Self:
        """Compile the program that a call with these arguments would run; only their shapes matter. Returns self."""
        self(prompt, **arguments, compile_only=True)  # type: ignore[operator]
        return self

    def load_lora_weights(self, source: str | Path, *, scale: float = 1.0) -> Self:
        """A pipeline whose networks have low-rank pairs merged into them (LoRA); this one stays as it is.

        Compiled programs are shared. Several files may be loaded one after another; the opposite scale takes one out.

        Args:
          source: ``pytorch_lora_weights.safetensors`` of this library or of PyTorch diffusers (``.bin`` too), or its
            folder.
          scale: how strongly it acts; 0 changes nothing.

        Raises:
          WeightsError: no such file, or it was made for other networks.
        """
        names = [name for name in self.params if name == "unet" or name.startswith("text_encoder")]
        pairs = load_lora(source, {name: self.components[name].shapes() for name in names})
        merged = {name: (self.components[name], merge(self.params[name], own, scale)) for name, own in pairs.items()}
        return self.replace(**merged)

    def load_textual_inversion(self, source: str | Path, *, token: str | None = None) -> Self:
        """A pipeline that knows one more word (textual inversion, one text encoder); this one stays as it is.

        Args:
          source: ``learned_embeds.safetensors``, a ``.bin`` or ``.pt`` file, or a folder with one.
          token: what the word shall be; the file's own if None.

        Raises:
          WeightsError: no such file, or not the embeddings of one word.
          ValueError: the word is known already, the embeddings have another width, or there are two text encoders.
        """
        if self.components.get("text_encoder_2") is not None:
            raise ValueError(f"textual inversion is for one text encoder; {type(self).__name__} has two")
        word, rows = tokens.load_rows(source, token)
        encoder, params = self.components["text_encoder"], self.params["text_encoder"]
        table = tokens.table_of(params)
        return self.replace(
            tokenizer=tokens.with_words(self.components["tokenizer"], word, len(rows)),
            text_encoder=tokens.with_rows(encoder, params, jnp.asarray(rows, table.dtype)),
        )


def generate(
    pipe: DiffusionPipeline,
    encoders: Sequence[str],
    encode: Callable[..., Text],
    prompts: tuple[Prompts, Prompts],
    guidance_scale: float | Sequence[float],
    options: CallOptions,
    **plan_options: Any,
) -> ImagePipelineOutput | None:
    """Make the pictures of a call.

    Args:
      pipe: the pipeline.
      encoders: names of the text encoders in the order in which ``encode`` takes them.
      encode: ``(encoders, params, ids, clip_skip) -> Text``, traced into the program.
      prompts: positive and negative, one row per prompt.
      guidance_scale: one, or one per picture.
      options: the other arguments of the call.
      **plan_options: more for the sampler's plan; those that are None are left to it.

    Raises:
      ValueError, TypeError: an argument is impossible or contradicts another one; nothing has been compiled.
    """
    copies, output_type = options.get("num_images_per_prompt", 1), options.get("output_type", "pil")
    height, width = check_size(pipe, options.get("height"), options.get("width"))
    task = make_task(pipe, encoders, encode, height, width, output_type, options.get("clip_skip"))
    positive, negative = jax.tree.map(lambda rows: np.repeat(rows, copies, axis=0), prompts)
    images = len(jax.tree.leaves(positive)[0])
    if guided := guides(pipe, guidance_scale):
        check_lengths(*prompts)
    draws, seeds = make_draws(
        images, options.get("seed"), options.get("key"), options.get("latents"), task.latent_shape, pipe.mesh
    )
    batch = Batch(
        positive,
        negative if guided else None,
        one_per_image(guidance_scale, images, "guidance_scale"),
        one_per_image(options.get("guidance_rescale", 0.0), images, "guidance_rescale"),
        draws,
    )
    steps, timesteps, sigmas = options.get("num_inference_steps"), options.get("timesteps"), options.get("sigmas")
    if steps is None and timesteps is None and sigmas is None:
        steps = STEPS
    more = {name: value for name, value in (plan_options | {"eta": options.get("eta")}).items() if value is not None}
    job = Job(task, batch, pipe.scheduler.plan(steps, timesteps=timesteps, sigmas=sigmas, **more), images, seeds)
    if options.get("compile_only", False):
        compile_job(pipe, job, options.get("batch_size"))
        return None
    return run_job(
        pipe,
        job,
        output_type,
        batch_size=options.get("batch_size"),
        callback=options.get("callback_on_step_end"),
        progress_bar=options.get("progress_bar", False),
    )


def check_options(pipe: DiffusionPipeline, options: CallOptions) -> None:
    """Refuse an argument that no call has.

    Raises:
      TypeError: it is named, with those that exist.
    """
    unknown = sorted(set(options) - set(CallOptions.__annotations__))
    if unknown:
        names = ", ".join(sorted(CallOptions.__annotations__))
        raise TypeError(
            f"{type(pipe).__name__} has no argument {', '.join(unknown)}; beside the prompts it has {names}"
        )
