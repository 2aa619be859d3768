"""Shared code of trainers of text-to-image models: opening them, what is trained, the loss, and saving.

Trainers differ in which parameters they train, in how these are combined with the frozen ones (:data:`Combine`), and in
their data. What differs between kinds of checkpoints is in :mod:`diffuse_jax.training.families`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffuse_jax import weights
from diffuse_jax.adapters import tokens
from diffuse_jax.adapters.lora import Adapted
from diffuse_jax.errors import WeightsError
from diffuse_jax.models import AutoencoderKL, Model, Params
from diffuse_jax.pipelines import DiffusionPipeline, catalogue
from diffuse_jax.pipelines.catalogue import NOT_LOADED, OPTIONAL
from diffuse_jax.sharding import param_shardings
from diffuse_jax.training.batches import Batch
from diffuse_jax.training.distributed import say
from diffuse_jax.training.families import TrainedFamily, Words, family_of, tokens_of, trained_family
from diffuse_jax.training.networks import warn_of_dropout
from diffuse_jax.training.objective import Objective, draw, errors, noised
from diffuse_jax.training.state import Metrics

Combine = Callable[[Params, Params], tuple[Mapping[str, Any], Params]]
"""``(frozen, trainable) -> (networks, parameters)``, both by component: the rule that distinguishes training
methods."""


def open_pipeline(
    source: str | Path,
    *,
    trainable: Sequence[str],
    mesh: Mesh,
    dtype: DTypeLike = jnp.float32,
    sources: Mapping[str, str | Path] | None = None,
    prediction_type: str | None = None,
    **hub: Any,
) -> DiffusionPipeline:
    """Open a pipeline for training: sharded over the mesh, with the noise schedule of training as its scheduler.

    Args:
      source: a folder or a Hub id.
      trainable: components whose parameters are loaded as float32; those of the others are cast to ``dtype``.
      mesh: the mesh that holds the parameters; each device loads only its shard.
      dtype: the dtype in which the networks compute. The autoencoder stays in float32 if the checkpoint requires it
        (``force_upcast``, SDXL).
      sources: network -> a folder or Hub id that it comes from instead, or one of a pipeline that has it.
      prediction_type: overrides the prediction type of the checkpoint's scheduler.
      **hub: ``revision``, ``variant``, ``cache_dir`` ... as in :meth:`DiffusionPipeline.from_pretrained`.

    Raises:
      WeightsError: as for :meth:`DiffusionPipeline.from_pretrained`.
      ValueError: the folder contains another kind of pipeline.
    """

    def opened(kind: type[Model], folder: Path, name: str) -> tuple[Model, Params]:
        return _open(kind, folder, name, name in trainable, mesh, dtype, hub.get("variant"))

    return _assembled(source, opened, mesh, sources or {}, prediction_type, hub)


def pipeline_of_shapes(
    source: str | Path,
    *,
    sources: Mapping[str, str | Path] | None = None,
    prediction_type: str | None = None,
    **hub: Any,
) -> DiffusionPipeline:
    """The pipeline of :func:`open_pipeline` with the shapes of its parameters in their place.

    It cannot run, but whatever depends on configurations can be checked with it before weights are downloaded or read.
    """

    def shapes(kind: type[Model], folder: Path, name: str) -> tuple[Model, Params]:
        model = kind.from_config(folder)
        return model, model.shapes()

    return _assembled(source, shapes, None, sources or {}, prediction_type, hub | {"only_small": True})


def _assembled(
    source: str | Path,
    open_network: Callable[[type[Model], Path, str], tuple[Model, Params]],
    mesh: Mesh | None,
    sources: Mapping[str, str | Path],
    prediction_type: str | None,
    hub: Mapping[str, Any],
) -> DiffusionPipeline:
    """A pipeline of the networks that ``open_network(class, folder, name)`` opens."""
    folder = weights.resolve(source, **hub)
    index = weights.read_index(folder)
    family = family_of(index.class_name, source)
    what = f"{source} is a {index.class_name}"
    family.check(_configs(index, (family.denoiser, *family.image_encoders)), what)
    unused = {*NOT_LOADED, *OPTIONAL} - {*family.image_encoders}
    parts: dict[str, Any] = {name: None for name in index.components if name in unused}
    for name, entry in index.components.items():
        if name not in parts and (kind := catalogue.network(entry)) is not None:
            origin = Path(sources.get(name, folder))
            parts[name] = open_network(kind, component_folder(origin, name, **hub), name)
    scheduler = family.scheduler(folder)
    if prediction_type is not None:
        scheduler = scheduler.replace(prediction_type=prediction_type)
    unchecked: dict[str, Any] = {"requires_safety_checker": False}  # images of training are not shown to others
    pipe = DiffusionPipeline.from_pretrained(folder, mesh=mesh, scheduler=scheduler, **unchecked, **parts)
    pipe = dataclasses.replace(pipe, options=index.options)
    found = _borrowed(family, index, sources, open_network, what, hub)
    nets = {name: part for name, part in found.items() if isinstance(part, tuple)}
    models = {name: nets[name][0] if name in nets else part for name, part in found.items()}
    params = {name: tree for name, (_, tree) in nets.items()}
    if mesh is not None:
        params = jax.device_put(params, param_shardings(params, mesh))
    return dataclasses.replace(pipe, components={**pipe.components, **models}, params={**pipe.params, **params})


def _configs(index: weights.PipelineIndex, names: Iterable[str]) -> dict[str, Any]:
    """The configurations of networks that an index names, by component."""
    entries = {name: index.components[name] for name in names if name in index.components}
    kinds = {name: catalogue.network(entry) for name, entry in entries.items()}
    return {name: kind.from_config(entries[name].folder).config for name, kind in kinds.items() if kind}


def _borrowed(
    family: TrainedFamily,
    index: weights.PipelineIndex,
    sources: Mapping[str, str | Path],
    open_network: Callable[[type[Model], Path, str], tuple[Model, Params]],
    what: str,
    hub: Mapping[str, Any],
) -> dict[str, Any]:
    """The components that training needs and the pipeline does not have, from the folder of another pipeline.

    Raises:
      ValueError: no such folder is named.
      WeightsError: it does not have them.
    """
    found: dict[str, Any] = {}
    for name in family.image_encoders:
        if name in index.components:
            continue
        if name not in sources:
            raise ValueError(f"{what}, which has no {name}; give --{family.borrowed[name]}, which has one")
        if Path(sources[name]).is_file():
            found[name] = family.read(Path(sources[name]))
            continue
        other = weights.read_index(weights.resolve(sources[name], **hub))
        entries = {wanted: other.components.get(wanted) for wanted in (name, *family.beside.get(name, {}))}
        if missing := [wanted for wanted, entry in entries.items() if entry is None]:
            raise WeightsError(f"{sources[name]} is a {other.class_name} without {' and '.join(missing)}")
        for wanted, entry in entries.items():
            assert entry is not None
            kind = catalogue.network(entry)
            here = family.beside.get(name, {}).get(wanted, wanted)
            found[here] = catalogue.open_other(entry) if kind is None else open_network(kind, entry.folder, wanted)
    return found


def _open(
    kind: type[Model], folder: Path, name: str, trained: bool, mesh: Mesh, dtype: DTypeLike, variant: str | None
) -> tuple[Model, Params]:
    """Open one network that computes in ``dtype``, with its parameters placed on the mesh."""
    model = kind.from_config(folder, dtype=jnp.dtype(dtype))
    say(f"loading {name} ({kind.__name__}) from {folder}")
    if trained:
        warn_of_dropout(model)
    if isinstance(model, AutoencoderKL) and model.config.force_upcast:
        model = model.clone(dtype=jnp.float32)
    kept = jnp.float32 if trained else model.dtype
    _, params = type(model).from_pretrained(
        folder,
        dtype=model.dtype,
        param_dtype=kept,
        variant=variant,
        shardings=param_shardings(model.shapes(), mesh),
    )
    return model, params


def component_folder(source: str | Path, name: str, **hub: Any) -> Path:
    """The folder of a network: ``source`` itself if it is one, or the subfolder ``name`` of a pipeline."""
    found = weights.resolve(source, **hub)
    inside = found / name
    return found if not inside.is_dir() and (found / "config.json").is_file() else inside


# Combining trainable and frozen parameters


def whole(models: Mapping[str, Any]) -> Combine:
    """Trained networks replace the frozen ones of the same name, but for what is fixed in them: full fine-tuning."""

    def combine(frozen: Params, trainable: Params) -> tuple[Mapping[str, Any], Params]:
        return models, {**frozen, **{name: {**frozen.get(name, {}), **tree} for name, tree in trainable.items()}}

    return combine


def with_lora(models: Mapping[str, Any], scale: float = 1.0) -> Combine:
    """Trained low-rank pairs are added to the frozen kernels: LoRA."""

    def combine(frozen: Params, trainable: Params) -> tuple[Mapping[str, Any], Params]:
        return {**models, **{name: Adapted(models[name], pairs, scale) for name, pairs in trainable.items()}}, frozen

    return combine


def with_tokens(models: Mapping[str, Any]) -> Combine:
    """The trained rows are the last token embeddings of the text encoders: textual inversion."""

    def combine(frozen: Params, trainable: Params) -> tuple[Mapping[str, Any], Params]:
        return models, {**frozen, **{name: tokens.combine(frozen[name], rows) for name, rows in trainable.items()}}

    return combine


# From examples to the loss


def finish(
    words: Mapping[str, Words],
    arrays: Mapping[str, Callable[[Any], np.ndarray]],
    images: Callable[[Any], Batch] | None,
    texts: Callable[[Any], Batch] | None,
    example: Any,
) -> Batch:
    """The arrays of one :class:`~diffuse_jax.training.data.Example`; runs in the data workers.

    Args:
      words: what makes tokens of captions, see :func:`~diffuse_jax.training.families.tokens_of`.
      arrays: makes the other arrays, see :meth:`~diffuse_jax.training.families.TrainedFamily.arrays`.
      images: a cache that replaces these and ``conditioning`` uint8 ``[h,w,3]``; None without one.
      texts: a cache that replaces the tokens; None without one.
      example: the image and its caption.
    """
    made = dict(tokens_of(words, example.caption) if texts is None else texts(example))
    if example.keeps_conditioning is not None:
        made["keeps_conditioning"] = np.array(example.keeps_conditioning, np.bool_)
    if images is not None:
        return made | images(example)
    if example.conditioning is not None:
        made["conditioning"] = example.conditioning
    return made | {name: make(example) for name, make in arrays.items()}


def denoising_loss(
    family: TrainedFamily,
    combine: Combine,
    objective: Objective,
    trainable: Params,
    frozen: Params,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
) -> tuple[jax.Array, Metrics]:
    """Squared error of the denoiser at random timesteps of clean samples (Rombach et al. 2022, eq. 2).

    ``batch`` has what :func:`finish` makes of each example, for Stable Diffusion ``pixel_values [B,H,W,3]`` (uint8, or
    float32 in [-1, 1]) or ``moments [B,h,w,2c]`` of the latents' distribution; token ids ``[B,L]`` under each text
    encoder's name, or the prompt embeddings ``states [B,L,D]`` and, for SDXL, ``pooled [B,P]``; for SDXL
    ``time_ids [B,6]``; with prior preservation ``prior [B]``; for a ControlNet or T2I-Adapter the images
    ``conditioning [B,H,W,3]`` uint8, also for a UNet that edits images, with ``keeps_conditioning [B]`` if some are
    dropped. ``loss_mask [B,h,w]`` weights the error of every place.
    """
    models, params = combine(frozen, trainable)
    k_begin, k_draw = jax.random.split(key)
    x0, given = family.begin(models, params, family.encoded(models, params, batch), k_begin)
    drawn = draw(objective, k_draw, x0)
    x = noised(objective, x0, drawn)
    prediction = family.predict(models, params, given, x, drawn.t)
    return errors(objective, prediction, x0, drawn, batch.get("prior"), batch.get("loss_mask"))


def loss_of(
    pipe: DiffusionPipeline, combine: Combine, objective: Objective, class_labels: str | None = None
) -> Callable[..., Any]:
    """:func:`denoising_loss` of a pipeline, in the form that :func:`~diffuse_jax.training.state.make_step` takes.

    ``class_labels`` are those of a super-resolution model of DeepFloyd IF, see ``class_labels_conditioning`` of
    :class:`~diffuse_jax.training.settings.ModelSettings`.
    """
    family = trained_family(pipe)
    return functools.partial(denoising_loss, family.with_class_labels(class_labels), combine, objective)


def networks(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What the loss of a pipeline needs, by name: the text encoders in their order, the denoiser, and for example the
    autoencoder and, if it has one, the ControlNet or T2I-Adapter."""
    family = trained_family(pipe)
    names = [*family.encoders, family.denoiser, *family.parts]
    return {name: pipe.components[name] for name in names if pipe.components.get(name) is not None}


def divided(pipe: DiffusionPipeline, names: Sequence[str]) -> tuple[dict[str, Params], dict[str, Params]]:
    """The parameters of the networks with these names, which are trained, and all others.

    What a family leaves :attr:`fixed <diffuse_jax.training.families.TrainedFamily.fixed>` in its denoiser is among the
    latter.
    """
    family = trained_family(pipe)
    trainable = {name: pipe.params[name] for name in names}
    frozen = {name: params for name, params in pipe.params.items() if name not in names}
    if family.fixed and family.denoiser in trainable:
        tree = trainable[family.denoiser]
        frozen[family.denoiser] = {name: tree[name] for name in family.fixed}
        trainable[family.denoiser] = {name: leaf for name, leaf in tree.items() if name not in family.fixed}
    return trainable, frozen


# Saving and validation


def save_networks(pipe: DiffusionPipeline, folder: Path, params: Mapping[str, Params]) -> None:
    """Write trained networks in inference format to ``folder/unet`` and so on."""
    for name, network_params in params.items():
        pipe.components[name].save_pretrained(folder / name, completed(pipe, name, network_params))


def completed(pipe: DiffusionPipeline, name: str, params: Params) -> Params:
    """The trained parameters of a network with those that are fixed in it; see :func:`divided`."""
    fixed = trained_family(pipe).fixed if name == trained_family(pipe).denoiser else ()
    return {**{leaf: pipe.params[name][leaf] for leaf in fixed}, **params}


def sample_images(pipe: DiffusionPipeline, prompts: Iterable[str], **options: Any) -> list[tuple[str, Any]]:
    """Generate validation images in one call of the pipeline, as pairs ``(prompt, PIL image)``."""
    texts = list(prompts)
    per = options.get("num_images_per_prompt", 1)
    images = pipe(texts, **options).images
    return [(texts[i // per], image) for i, image in enumerate(images)]
