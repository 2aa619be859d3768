"""The latent text-to-image model that training starts from: opening it, and saving a complete pipeline at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from diffuse_jax import weights
from diffuse_jax.limits import refuse_links
from diffuse_jax.models import Params
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.training.hub import model_folder
from diffuse_jax.training.latent import component_folder, family_of, open_pipeline, pipeline_of_shapes
from diffuse_jax.training.optimizer import check_rates
from diffuse_jax.training.settings import ModelSettings, OptimizerSettings


def source_folder(model: ModelSettings, *, only_small: bool = False) -> Path:
    """The local folder of the model; with ``only_small``, its weights need not be there."""
    return model_folder(model.pretrained_model_name_or_path, model.hub, only_small=only_small)


def trained_names(model: ModelSettings, optimizer: OptimizerSettings) -> tuple[str, ...]:
    """The names of the networks that are trained.

    Raises:
      ValueError: a learning rate is set for the text encoders, but they are not trained.
    """
    names: tuple[str, ...] = ("unet",)
    if model.train_text_encoder:
        index = weights.read_index(source_folder(model, only_small=True))
        encoders = family_of(index.class_name, model.pretrained_model_name_or_path).encoders
        names += tuple(name for name in encoders if name in index.components)
    check_rates(optimizer, names)
    return names


def configured_from(model: ModelSettings) -> DiffusionPipeline:
    """The pipeline with the shapes of its parameters in their place, for checks before the weights are read.

    Raises:
      WeightsError, ValueError: as for :func:`~diffuse_jax.training.latent.open_pipeline`, except those about weights.
    """
    vae = model.pretrained_vae_model_name_or_path
    return pipeline_of_shapes(
        source_folder(model, only_small=True),
        vae_source=None if vae is None else model_folder(vae, model.hub, only_small=True),
        prediction_type=model.prediction_type,
    )


def pipeline_from(model: ModelSettings, mesh: Mesh, float32: Sequence[str]) -> DiffusionPipeline:
    """The pipeline on a mesh; the parameters of the networks named in ``float32`` keep that precision.

    Raises:
      WeightsError, ValueError: as for :func:`~diffuse_jax.training.latent.open_pipeline`.
    """
    vae = model.pretrained_vae_model_name_or_path
    pipe = open_pipeline(
        source_folder(model),
        trainable=float32,
        mesh=mesh,
        dtype=model.compute.dtype,
        vae_source=None if vae is None else model_folder(vae, model.hub),
        prediction_type=model.prediction_type,
        **model.hub.options,
    )
    unet = pipe.components["unet"].clone(remat=model.compute.remat)
    return pipe.replace(unet=(unet, pipe.params["unet"]))


def component_from(model: ModelSettings, pipe: DiffusionPipeline, name: str) -> tuple[Any, Params]:
    """A network of the pipeline, with parameters that this process can use without the others."""
    network = pipe.components[name]
    if jax.process_count() == 1:
        return network, pipe.params[name]
    replaced = model.pretrained_vae_model_name_or_path if name == "vae" else None
    folder = component_folder(model_folder(replaced or model.pretrained_model_name_or_path, model.hub), name)
    return network, type(network).from_pretrained(folder, dtype=network.dtype, variant=model.hub.variant)[1]


def save_rest(model: ModelSettings, pipe: DiffusionPipeline, folder: str | Path, trained: Iterable[str]) -> None:
    """Complete the trained networks in a folder to a pipeline, by copying all other files of the source unchanged.

    All processes may call this; process 0 writes.

    The scheduler is the source's sampler, with the prediction type used in training. ``model_index.json`` is written
    last; it omits components that the source names but does not contain.
    """
    if jax.process_index() != 0:
        return
    source, folder = source_folder(model), Path(folder)
    index, kept, vae = weights.read_index(source), set(trained), model.pretrained_vae_model_name_or_path
    for name, entry in index.components.items():
        if entry.folder.is_dir() and name not in kept:
            origin = component_folder(model_folder(vae, model.hub), name) if vae and name == "vae" else entry.folder
            copy_component(origin, folder / name, model.hub.variant)
            kept.add(name)
    sampler = Scheduler.from_pretrained(source, subfolder="scheduler")
    sampler.replace(prediction_type=pipe.scheduler.prediction_type).save_pretrained(folder / "scheduler")
    entries: dict[str, tuple[str | None, str | None]] = dict.fromkeys(index.absent, (None, None))
    for name, entry in index.components.items():
        entries[name] = (entry.library, entry.class_name) if name in kept else (None, None)
    weights.write_index(folder, type(pipe).__name__, entries, index.options)


def copy_component(source: Path, target: Path, variant: str | None = None) -> None:
    """Copy the files of a component and remove other weights from ``target``; nothing is copied onto itself.

    Files of a variant are renamed to have none unless such files exist, since the trained networks have no variant.
    """
    if not (target.is_dir() and target.samefile(source)):
        for old in target.glob("*"):
            if old.suffix in (".safetensors", ".bin", ".msgpack") or ".index." in old.name:
                old.unlink()
        shutil.copytree(refuse_links(source, deep=True), target, dirs_exist_ok=True)
    for path in target.glob(f"*.{variant}[.-]*") if variant else ():
        plain = path.with_name(path.name.replace(f".{variant}", "", 1))
        if not plain.exists():
            if path.suffix == ".json":  # an index, with the names of shards in it
                path.write_text(path.read_text(encoding="utf-8").replace(f".{variant}-", "-"), encoding="utf-8")
            path.rename(plain)
