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
from diffuse_jax.schedulers import LCMScheduler, Scheduler, TCDScheduler
from diffuse_jax.training.families import check_method, family_of, trained_family
from diffuse_jax.training.hub import model_folder
from diffuse_jax.training.latent import component_folder, open_pipeline, pipeline_of_shapes
from diffuse_jax.training.optimizer import check_rates
from diffuse_jax.training.settings import ModelSettings, OptimizerSettings


def source_folder(model: ModelSettings, *, only_small: bool = False) -> Path:
    """The local folder of the model; with ``only_small``, its weights need not be there."""
    return model_folder(model.pretrained_model_name_or_path, model.hub, only_small=only_small)


def trained_names(model: ModelSettings, optimizer: OptimizerSettings, pipe: DiffusionPipeline) -> tuple[str, ...]:
    """The names of the networks of a pipeline that are trained.

    Raises:
      ValueError: the text encoders are to be trained and cannot be, or a learning rate is set for them, but they are
        not trained.
    """
    family = trained_family(pipe)
    names: tuple[str, ...] = (family.denoiser,)
    if model.train_text_encoder:
        if not family.trains_text:
            raise ValueError(
                f"--train_text_encoder cannot be used with {type(pipe).__name__}: "
                + family.refused.get("train_text_encoder", "its text encoder stays as it is")
            )
        names += tuple(family.text_encoders(pipe))
    check_rates(optimizer, names)
    return names


def configured_from(model: ModelSettings, method: str) -> DiffusionPipeline:
    """The pipeline with the shapes of its parameters in their place, for checks before the weights are read.

    Args:
      model: where it comes from.
      method: the trainer, one of :data:`~diffuse_jax.training.families.base.METHODS`.

    Raises:
      WeightsError, ValueError: the method does not support the pipeline, as few of them support models that have been
        distilled, or as for
        :func:`~diffuse_jax.training.latent.open_pipeline`, except those about weights.
    """
    folder, source = source_folder(model, only_small=True), model.pretrained_model_name_or_path
    class_name = weights.read_index(folder).class_name
    family_of(class_name, source, method)
    if method in ("distillation", "reward"):
        refuse_few_steps(Scheduler.from_pretrained(folder, subfolder="scheduler"), source)
    pipe = pipeline_of_shapes(
        folder, sources=sources_of(model, class_name, only_small=True), prediction_type=model.prediction_type
    )
    check_method(pipe, source, method)
    return pipe


def refuse_few_steps(sampler: Scheduler, source: str | Path) -> None:
    """Refuse a model that has been distilled to few steps, as the sampler of its folder says.

    Raises:
      ValueError: it has.
    """
    if isinstance(sampler, LCMScheduler | TCDScheduler):
        raise ValueError(
            f"{source} has a {type(sampler).__name__}, so it has been distilled to few steps before; give the model "
            "that it was distilled from, and distil the result"
        )


def sources_of(model: ModelSettings, class_name: str, *, only_small: bool = False) -> dict[str, Path]:
    """The local folders of networks that come from another place than the rest of a pipeline of this class."""
    family = family_of(class_name, model.pretrained_model_name_or_path)
    named = {name: getattr(model, setting) for name, setting in family.borrowed.items()}
    local = lambda source: (
        Path(source) if Path(source).is_file() else model_folder(source, model.hub, only_small=only_small)
    )
    return {name: local(source) for name, source in named.items() if source}


def pipeline_from(model: ModelSettings, mesh: Mesh, float32: Sequence[str]) -> DiffusionPipeline:
    """The pipeline on a mesh; the parameters of the networks named in ``float32`` keep that precision.

    Raises:
      WeightsError, ValueError: as for :func:`~diffuse_jax.training.latent.open_pipeline`.
    """
    folder = source_folder(model)
    pipe = open_pipeline(
        folder,
        trainable=float32,
        mesh=mesh,
        dtype=model.compute.dtype,
        sources=sources_of(model, weights.read_index(folder).class_name),
        prediction_type=model.prediction_type,
        **model.hub.options,
    )
    name = trained_family(pipe).denoiser
    network = pipe.components[name]
    if model.compute.remat == "none":
        return pipe
    return pipe.replace(**{name: (network.clone(remat=model.compute.remat), pipe.params[name])})


def component_from(model: ModelSettings, pipe: DiffusionPipeline, name: str) -> tuple[Any, Params]:
    """A network of the pipeline, with parameters that this process can use without the others."""
    network = pipe.components[name]
    if jax.process_count() == 1:
        return network, pipe.params[name]
    source = sources_of(model, type(pipe).__name__).get(name, source_folder(model))
    if source.is_file():
        return trained_family(pipe).read(source)
    folder = component_folder(source, name)
    return network, type(network).from_pretrained(folder, dtype=network.dtype, variant=model.hub.variant)[1]


def save_rest(
    model: ModelSettings,
    pipe: DiffusionPipeline,
    folder: str | Path,
    trained: Iterable[str],
    sampler: Scheduler | None = None,
) -> None:
    """Complete the trained networks in a folder to a pipeline, by copying all other files of the source unchanged.

    All processes may call this; process 0 writes.

    The scheduler is ``sampler``, or else the source's with the prediction type used in training. ``model_index.json``
    is written last; it omits components that the source names but does not contain.
    """
    if jax.process_index() != 0:
        return
    source, folder = source_folder(model), Path(folder)
    index, kept = weights.read_index(source), set(trained)
    others = sources_of(model, index.class_name)
    for name, entry in index.components.items():
        if entry.folder.is_dir() and name not in kept:
            origin = component_folder(others[name], name) if name in others else entry.folder
            copy_component(origin, folder / name, model.hub.variant)
            kept.add(name)
    own = Scheduler.from_pretrained(source, subfolder="scheduler")
    (sampler or trained_family(pipe).sampler(own, pipe.scheduler)).save_pretrained(folder / "scheduler")
    entries: dict[str, tuple[str | None, str | None]] = dict.fromkeys(index.absent, (None, None))
    for name, entry in index.components.items():
        entries[name] = (entry.library, entry.class_name) if name in kept else (None, None)
    if sampler is not None:
        entries["scheduler"] = ("diffusers", type(sampler).__name__)
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
