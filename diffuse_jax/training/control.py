"""Training a ControlNet: opening or creating it, the control images of the validation, and saving."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from diffuse_jax.models import ControlNetModel, Params
from diffuse_jax.models.controlnet import ControlNetConfig, check_fits
from diffuse_jax.pipelines import AutoPipelineForText2Image, DiffusionPipeline
from diffuse_jax.training.data import DataSettings, Record, transform_from
from diffuse_jax.training.latent_model import pipeline_from
from diffuse_jax.training.networks import configured_network, open_network
from diffuse_jax.training.settings import ControlSettings, ModelSettings, NetworkSettings, ValidationSettings
from diffuse_jax.training.validation import validation_from

WIDTHS = ControlNetConfig().conditioning_embedding_out_channels
"""Widths of the embedding of control images, from full resolution down."""


def controlled_from(control: ControlSettings, model: ModelSettings, mesh: Mesh, seed: int = 0) -> DiffusionPipeline:
    """The pipeline on a mesh with the ControlNet to train, whose parameters are float32, as ``controlnet``.

    A new ControlNet is a copy of the UNet's encoder that changes nothing yet; its image embedding is drawn from
    ``seed``.

    Raises:
      WeightsError: a model does not exist, does not fit its config, or has no pipeline with ControlNets.
      ValueError: the ControlNet does not fit the model, or does not read RGB images.
    """
    new = control.controlnet_model_name_or_path is None
    pipe = pipeline_from(model, mesh, float32=("unet",) if new else ())
    net, params = _new(pipe, pipe.params["unet"], seed) if new else _opened(control, model, mesh)
    check_fit(net, pipe)
    unet = pipe.components["unet"]
    lowered = jax.tree.map(lambda x: x.astype(unet.dtype), pipe.params["unet"])  # it is frozen
    return AutoPipelineForText2Image.from_pipe(pipe, unet=(unet, lowered), controlnet=(net, params))


def control_shapes(control: ControlSettings, model: ModelSettings, pipe: DiffusionPipeline) -> Params:
    """The shapes of the ControlNet of :func:`controlled_from`, for a pipeline that may have only shapes itself.

    Raises:
      WeightsError, ValueError: as for :func:`controlled_from`, except those about weights.
    """
    if control.controlnet_model_name_or_path is None:
        return jax.eval_shape(lambda params: _new(pipe, params, 0)[1], pipe.params["unet"])
    net = configured_network(ControlNetModel, _source(control, model), "controlnet", ControlNetConfig())
    check_fit(net, pipe)
    return net.shapes()


def _new(pipe: DiffusionPipeline, params: Params, seed: int) -> tuple[ControlNetModel, Params]:
    """A ControlNet that embeds images at the resolution of the latents, from the parameters of the UNet."""
    levels = pipe.components["vae"].config.scale.bit_length()
    widths = tuple(WIDTHS[min(level, len(WIDTHS) - 1)] for level in range(levels))
    unet, key = pipe.components["unet"], jax.random.key(seed)
    return ControlNetModel.from_unet(unet, params, conditioning_embedding_out_channels=widths, key=key)


def _opened(control: ControlSettings, model: ModelSettings, mesh: Mesh) -> tuple[ControlNetModel, Params]:
    """The ControlNet of the settings."""
    net, params = open_network(ControlNetModel, _source(control, model), mesh, "controlnet", ControlNetConfig())
    return net.clone(remat=model.compute.remat), params


def _source(control: ControlSettings, model: ModelSettings) -> NetworkSettings:
    """Where the ControlNet is; it is a model of its own, so it has neither the variant nor the revision of the
    pipeline."""
    return NetworkSettings(
        pretrained_model_name_or_path=control.controlnet_model_name_or_path,
        compute=model.compute,
        hub=dataclasses.replace(model.hub, revision=control.controlnet_revision, variant=None),
    )


def check_fit(net: ControlNetModel, pipe: DiffusionPipeline) -> None:
    """Check that a ControlNet has been made for a UNet and its autoencoder.

    Raises:
      ValueError: it has not; the message names the first setting that differs.
    """
    c, unet = net.config, pipe.components["unet"].config
    check_fits(c, unet)
    if c.in_channels != unet.in_channels:
        raise ValueError(f"the ControlNet has in_channels={c.in_channels}, and the UNet {unet.in_channels}")
    scale = pipe.components["vae"].config.scale
    if (c.conditioning_channels, c.scale) != (3, scale):
        raise ValueError(
            f"the ControlNet must read RGB images at {scale} pixels per latent, but it has "
            f"conditioning_channels={c.conditioning_channels} and {c.scale} pixels per latent"
        )


def save_controlnet(net: ControlNetModel, output: str | Path, folder: Path, params: Params) -> None:
    """Write a ControlNet in diffusers layout: to the folder ``output`` itself, elsewhere to ``folder/controlnet``."""
    net.save_pretrained(folder if folder == Path(output) else folder / "controlnet", params["controlnet"])


def control_validation(
    shown: ValidationSettings,
    control: ControlSettings,
    model: ModelSettings,
    data: DataSettings,
    pipe: DiffusionPipeline,
    seed: int = 0,
) -> Callable[[Any], list[tuple[str, Any]]] | None:
    """As :func:`~diffuse_jax.training.validation.validation_from`; the control images are shown first.

    Raises:
      ValueError: there are prompts without images, images without prompts, or different numbers of both.
    """
    prompts, paths = shown.validation_prompt or (), control.validation_image or ()
    if not prompts and not paths:
        return None
    if not prompts or not paths or (len(prompts) != len(paths) and 1 not in (len(prompts), len(paths))):
        raise ValueError(
            f"--validation_image needs one image for all of --validation_prompt or one for each, got {len(paths)} "
            f"images and {len(prompts)} prompts"
        )
    count = max(len(prompts), len(paths))
    images = control_images(paths, data)
    prompts, images = prompts * (count // len(prompts)), images * (count // len(images))
    seen = [(f"{prompt} (control image)", Image.fromarray(image)) for prompt, image in zip(prompts, images)]
    shown = dataclasses.replace(shown, validation_prompt=tuple(prompts))
    sample = validation_from(shown, model, pipe, lambda trained: trained, seed, images)
    assert sample is not None  # there are prompts
    return lambda trained: seen + sample(trained)


def control_images(paths: Sequence[str | Path], data: DataSettings) -> list[np.ndarray]:
    """Control images uint8 ``[resolution,resolution,3]`` from files, prepared like those of the data.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file cannot be read as an image.
    """
    transform, found = transform_from(data), []
    for path in paths:
        example = transform.fixed(Record(str(path), ("",), str(path)), 0)
        found.append(example.pixels if example.conditioning is None else example.conditioning)
    return [np.asarray(image) for image in found]
