"""Training a ControlNet or a T2I-Adapter: opening or creating it, the control images of the validation, and saving."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from diffuse_jax.config import Config
from diffuse_jax.models import ControlNetModel, Model, Params, T2IAdapter, UNet2DConditionConfig
from diffuse_jax.models.controlnet import ControlNetConfig, check_fits
from diffuse_jax.models.t2i_adapter import T2IAdapterConfig
from diffuse_jax.pipelines import AutoPipelineForText2Image, DiffusionPipeline
from diffuse_jax.pipelines.pipeline import pipeline_class
from diffuse_jax.training.cached import inputs_from
from diffuse_jax.training.checked import checked_source
from diffuse_jax.training.data import DataSettings, Record, batches_from, transform_from
from diffuse_jax.training.initial import initial_params
from diffuse_jax.training.latent import loss_of, networks, whole
from diffuse_jax.training.latent_model import configured_from, pipeline_from
from diffuse_jax.training.loop import fit
from diffuse_jax.training.networks import configured_network, open_network
from diffuse_jax.training.objective import objective_from
from diffuse_jax.training.settings import (
    BesideSettings,
    ModelSettings,
    NetworkSettings,
    ObjectiveSettings,
    RunSettings,
    ValidationImageSettings,
    ValidationSettings,
)
from diffuse_jax.training.start import check_output
from diffuse_jax.training.upload import push_to_hub
from diffuse_jax.training.validation import validation_from

WIDTHS = ControlNetConfig().conditioning_embedding_out_channels
"""Widths of the embedding of control images, from full resolution down."""


class Kind(NamedTuple):
    """A kind of network that is trained beside a frozen pipeline.

    Attributes:
      component: its name in pipelines.
      folder: its folder in a checkpoint.
      model: its class.
      config: a config of this class.
      new: makes one for a pipeline from the UNet's parameters and a seed.
      check: refuses one that does not fit a pipeline.
    """

    component: str
    folder: str
    model: type[Model]
    config: Config
    new: Callable[[DiffusionPipeline, Params, int], tuple[Any, Params]]
    check: Callable[[Any, DiffusionPipeline], None]


class BesideRun(NamedTuple):
    """The settings of a run that trains such a network."""

    run: RunSettings
    model: ModelSettings
    data: DataSettings
    learned: ObjectiveSettings
    shown: ValidationSettings
    control: BesideSettings


def train_beside(kind: Kind, settings: BesideRun, mesh: Mesh, config: Mapping[str, Any]) -> None:
    """Train such a network on a mesh, and print where it is; ``config`` is what checkpoints say of the run.

    Raises:
      ValueError, OSError, WeightsError: a setting cannot work; nothing has been written.
    """
    run, model, data, learned, shown, control = settings
    name = kind.component
    check_output(run, data.caches.data_cache_dir)
    plan = configured_from(model, "control")
    shapes = {name: beside_shapes(kind, control, model, plan)}
    control_validation(shown, control, model, data, plan)  # checks the prompts and images
    source = checked_source(run, model, data, learned, mesh, plan, trainable=shapes)
    pipe = beside(kind, control, model, mesh, run.seed)
    validate = control_validation(shown, control, model, data, pipe, run.seed)

    inputs = inputs_from(data, model, pipe, trained=(name,), source=source, true_sizes=False)
    objective = objective_from(learned, pipe.scheduler)
    fit(
        run,
        mesh,
        trainable={name: pipe.params[name]},
        frozen={part: params for part, params in pipe.params.items() if part not in (name, *inputs.unused)},
        loss=loss_of(pipe, whole(networks(pipe)), objective),
        batches=batches_from(data, run.batch, mesh, inputs.finish, source=inputs.source, pixels=inputs.pixels),
        export=functools.partial(save_beside, kind, pipe.components[name], run.output_dir),
        validate=validate,
        config=config,
    )
    print(run.output_dir)
    push_to_hub(run.upload, run.output_dir)


def beside(kind: Kind, control: BesideSettings, model: ModelSettings, mesh: Mesh, seed: int = 0) -> DiffusionPipeline:
    """The pipeline on a mesh with the network to train, whose parameters are float32, as ``kind.component``.

    A new ControlNet is a copy of the UNet's encoder that changes nothing yet; its image embedding is drawn from
    ``seed``, as a new T2I-Adapter is.

    Raises:
      WeightsError: a model does not exist, does not fit its config, or has no pipeline with such networks.
      ValueError: the network does not fit the model, or does not read RGB images.
    """
    pipe = pipeline_from(model, mesh, float32=("unet",) if control.source is None else ())
    if control.source is None:
        net, params = kind.new(pipe, pipe.params["unet"], seed)
    else:
        net, params = open_network(kind.model, _source(control, model), mesh, kind.component, kind.config)
        net = net.clone(remat=model.compute.remat)
    kind.check(net, pipe)
    unet = pipe.components["unet"]
    lowered = jax.tree.map(lambda x: x.astype(unet.dtype), pipe.params["unet"])  # it is frozen
    return with_network(kind, pipe, unet=(unet, lowered), **{kind.component: (net, params)})


def with_network(kind: Kind, pipe: DiffusionPipeline, **components: Any) -> DiffusionPipeline:
    """The text-to-image pipeline of the same family that takes such a network.

    Raises:
      WeightsError: there is none.
    """
    if kind.component == "controlnet":
        return AutoPipelineForText2Image.from_pipe(pipe, **components)
    without = {"controlnet": None, "enable_pag": False}
    plain = AutoPipelineForText2Image.pipeline_for(type(pipe), "this pipeline", without)
    target = pipeline_class(plain.__name__.replace("Pipeline", "AdapterPipeline"), "this pipeline")
    return target.from_pipe(pipe, **components)


def beside_shapes(kind: Kind, control: BesideSettings, model: ModelSettings, pipe: DiffusionPipeline) -> Params:
    """The shapes of the network of :func:`beside`, for a pipeline that may have only shapes itself.

    Raises:
      WeightsError, ValueError: as for :func:`beside`, except those about weights.
    """
    if control.source is None:
        return jax.eval_shape(lambda params: kind.new(pipe, params, 0)[1], pipe.params["unet"])
    net = configured_network(kind.model, _source(control, model), kind.component, kind.config)
    kind.check(net, pipe)
    return net.shapes()


def _source(control: BesideSettings, model: ModelSettings) -> NetworkSettings:
    """Where the network is; it is a model of its own, so it has neither the variant nor the revision of the
    pipeline."""
    return NetworkSettings(
        pretrained_model_name_or_path=control.source,
        compute=model.compute,
        hub=dataclasses.replace(model.hub, revision=control.revision, variant=None),
    )


def _new_controlnet(pipe: DiffusionPipeline, params: Params, seed: int) -> tuple[ControlNetModel, Params]:
    """A ControlNet that embeds images at the resolution of the latents, from the parameters of the UNet."""
    levels = pipe.components["vae"].config.scale.bit_length()
    widths = tuple(WIDTHS[min(level, len(WIDTHS) - 1)] for level in range(levels))
    unet, key = pipe.components["unet"], jax.random.key(seed)
    return ControlNetModel.from_unet(unet, params, conditioning_embedding_out_channels=widths, key=key)


def check_controlnet(net: ControlNetModel, pipe: DiffusionPipeline) -> None:
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


def _new_adapter(pipe: DiffusionPipeline, params: Params, seed: int) -> tuple[T2IAdapter, Params]:
    """A T2I-Adapter of the form that the published ones for this kind of UNet have."""
    unet = pipe.components["unet"]
    net = T2IAdapter(adapter_config(unet.config, pipe.components["vae"].config.scale), dtype=unet.dtype)
    net = net.clone(remat=unet.remat)
    return net, initial_params(net, seed, ())


def adapter_config(unet: UNet2DConditionConfig, scale: int) -> T2IAdapterConfig:
    """The T2I-Adapter for a UNet whose autoencoder has ``scale`` pixels per latent.

    A UNet adds features at the end of a level with attention before it halves the resolution, and at the end of one
    without attention after that.

    Raises:
      ValueError: no form of T2I-Adapter has features at these resolutions.
    """
    last = len(unet.block_out_channels) - 1
    halvings = [i + (i < last and "Attn" not in kind) for i, kind in enumerate(unet.down_block_types)]
    channels = tuple(unet.block_out_channels)
    if halvings == [*range(last + 1)]:
        return T2IAdapterConfig(channels=channels, downscale_factor=scale)
    if halvings == [1, 1, 2]:
        return T2IAdapterConfig(
            channels=(*channels, channels[-1]), downscale_factor=2 * scale, adapter_type="full_adapter_xl"
        )
    raise ValueError(f"there is no T2I-Adapter for a UNet with down_block_types={unet.down_block_types}")


def check_adapter(net: T2IAdapter, pipe: DiffusionPipeline) -> None:
    """Check that a T2I-Adapter fits a UNet and its autoencoder.

    Raises:
      ValueError: it does not; the message has both.
    """
    wanted = adapter_config(pipe.components["unet"].config, pipe.components["vae"].config.scale)
    levels = len(pipe.components["unet"].config.block_out_channels)
    features = lambda c: (c.in_channels, c.downscale_factor, *((s.channels, s.halved) for s in c.stages()[:levels]))
    if features(net.config) != features(wanted):
        show = lambda c: (
            f"in_channels={c.in_channels}, channels={c.channels}, downscale_factor={c.downscale_factor} and "
            f"adapter_type={c.adapter_type!r}"
        )
        raise ValueError(f"the T2I-Adapter must fit the UNet, as {show(wanted)} do; it has {show(net.config)}")


CONTROLNET = Kind("controlnet", "controlnet", ControlNetModel, ControlNetConfig(), _new_controlnet, check_controlnet)
ADAPTER = Kind("adapter", "t2iadapter", T2IAdapter, T2IAdapterConfig(), _new_adapter, check_adapter)


def save_beside(kind: Kind, net: Model, output: str | Path, folder: Path, params: Params) -> None:
    """Write the network in diffusers layout: to the folder ``output`` itself, elsewhere to ``folder/kind.folder``."""
    net.save_pretrained(folder if folder == Path(output) else folder / kind.folder, params[kind.component])


def control_validation(
    shown: ValidationSettings,
    control: ValidationImageSettings,
    model: ModelSettings,
    data: DataSettings,
    pipe: DiffusionPipeline,
    seed: int = 0,
    what: str = "control image",
) -> Callable[[Any], list[tuple[str, Any]]] | None:
    """As :func:`~diffuse_jax.training.validation.validation_from`; the images are shown first, as
    ``what``.

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
    seen = [(f"{prompt} ({what})", Image.fromarray(image)) for prompt, image in zip(prompts, images)]
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
