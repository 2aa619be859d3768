"""Training a model to edit images as a prompt instructs: the UNet's further channels, and its pipeline (Brooks et al.
2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffuse_jax.models import Params
from diffuse_jax.pipelines import AutoPipelineForText2Image, DiffusionPipeline
from diffuse_jax.pipelines.pipeline import pipeline_class


def with_image_channels(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The InstructPix2Pix pipeline of the same family, whose UNet also reads the latents of the original image.

    The kernel of its first convolution is zero for the new channels, so it makes the same predictions at first.

    Args:
      pipe: a pipeline for text to image; its parameters may be shapes (``jax.ShapeDtypeStruct``).

    Raises:
      WeightsError: the family has no such pipeline.
    """
    unet, params = pipe.components["unet"], pipe.params["unet"]
    more = pipe.components["vae"].config.latent_channels
    config = unet.config.replace(in_channels=unet.config.in_channels + more)
    shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    grown = jax.eval_shape(lambda p: with_zeros(p, more), params) if shapes else with_zeros(params, more)
    without = {"controlnet": None, "enable_pag": False}
    plain = AutoPipelineForText2Image.pipeline_for(type(pipe), "this pipeline", without)
    target = pipeline_class(plain.__name__.replace("Pipeline", "InstructPix2PixPipeline"), "this pipeline")
    return target.from_pipe(pipe, unet=(unet.clone(config=config), grown))


def with_zeros(params: Mapping[str, Any], channels: int) -> Params:
    """A UNet's parameters with ``channels`` more input channels, whose weights are zero; the bias is kept."""
    first = params["conv_in"]
    kernel = jnp.pad(first["kernel"], ((0, 0), (0, 0), (0, channels), (0, 0)))
    return {**params, "conv_in": {**first, "kernel": kernel}}
