"""Open and save the components and parameters of a folder, whatever the pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffuse_jax import weights
from diffuse_jax.models import (
    CLIPVisionModelWithProjection,
    ControlNetModel,
    DPTForDepthEstimation,
    IFSafetyChecker,
    Model,
    Params,
    StableDiffusionSafetyChecker,
    T2IAdapter,
)
from diffuse_jax.pipelines import catalogue
from diffuse_jax.pipelines.catalogue import NOT_LOADED, OPTIONAL
from diffuse_jax.processors import ImageProcessor
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.sharding import automatic, param_shardings
from diffuse_jax.weights import Component
from diffuse_jax.weights.files import require_folder, unchanged
from diffuse_jax.writing import naming

OURS: Mapping[str, type] = {"scheduler": Scheduler, "feature_extractor": ImageProcessor}
"""Components that have to be of a class of this library -> the class."""

ROLES: Mapping[str, tuple[type[Model], ...]] = {
    "controlnet": (ControlNetModel,),
    "adapter": (T2IAdapter,),
    "image_encoder": (CLIPVisionModelWithProjection,),
    "safety_checker": (StableDiffusionSafetyChecker, IFSafetyChecker),
    "depth_estimator": (DPTForDepthEstimation,),
}
"""Components that no other network of this library can be -> their classes."""

Parts = dict[str, Any]
"""Component name -> network, tuple of networks, scheduler, tokenizer or None."""


def refuse_family(target: Any, index: weights.PipelineIndex, given: Collection[str], source: Any) -> None:
    """Refuse to open a checkpoint with a pipeline of another family, which would ignore some of its text encoders.

    Raises:
      TypeError: the checkpoint has unused text encoders; the message says which class to open it with.
    """
    entries = [name for name in index.components if name not in given]
    if unused := unused_encoders(target, entries):
        raise TypeError(
            f"{source} is a {index.class_name} with {', '.join(unused)}, which {target.__name__} does not use; open it "
            "with DiffusionPipeline or AutoPipelineForText2Image, which choose the right class"
        )


def unused_encoders(target: Any, names: Iterable[str]) -> list[str]:
    """The text encoders among names of components that a pipeline class does not use."""
    encoders = getattr(target.family, "encoders", None)
    return [] if encoders is None else [x for x in names if x.startswith("text_encoder") and x not in encoders]


def without_unused_text(
    target: Any, source: type, parts: Parts, params: dict[str, Params]
) -> tuple[Parts, dict[str, Params]]:
    """Components and parameters of a ``source`` pipeline as a ``target`` uses them: one that takes no prompts has
    neither text encoders nor tokenizers.

    Raises:
      TypeError: the target takes prompts, but would ignore a text encoder of the source.
    """
    unused = unused_encoders(target, [name for name, part in parts.items() if part is not None])
    if unused and target.family.encoders:
        raise TypeError(
            f"a {source.__name__} has {', '.join(unused)}, which {target.__name__} does not use; take a class of its "
            "family (AutoPipelineForText2Image chooses one), or leave them out (None)"
        )
    left = [name for name in parts if unused and name.startswith(("text_encoder", "tokenizer"))]
    kept = lambda table: {name: value for name, value in table.items() if name not in left}
    return kept(parts), kept(params)


def open_components(
    index: weights.PipelineIndex,
    given: Mapping[str, Any],
    *,
    dtype: DTypeLike,
    mesh: Mesh | None,
    variant: str | None,
) -> tuple[Parts, dict[str, Params]]:
    """The components of a folder and the parameters of its networks, with those that the caller passed in their place.

    Raises:
      WeightsError: a class is unknown, or weights do not fit. All classes are checked before anything is read.
      TypeError: a component that the caller passed is of the wrong kind.
    """
    wanted = {name: entry for name, entry in index.components.items() if name not in given}
    for name, entry in wanted.items():
        catalogue.check(name, entry)
        if name in OPTIONAL and not entry.folder.is_dir():
            raise weights.WeightsError(f"{entry.folder}: no such folder; pass {name}=None to open without it")
    read = [name for name in wanted if name not in NOT_LOADED]
    folders = [entry.folder for name in read for entry in catalogue.folders(name, wanted[name])]
    with unchanged(*folders, *{folder.parent / weights.index.FILE for folder in folders}):
        parts, params = _open(wanted, mesh, dtype, variant)
    return with_overrides(dict.fromkeys(index.absent) | parts, params, given)


def _open(
    wanted: Mapping[str, Component], mesh: Mesh | None, dtype: DTypeLike, variant: str | None
) -> tuple[Parts, dict[str, Params]]:
    parts: Parts = {}
    params: dict[str, Params] = {}
    for name, entry in wanted.items():
        if name in NOT_LOADED:
            parts[name] = None
        elif catalogue.is_network(entry):
            opened = [_open_network(e, dtype, mesh, variant) for e in catalogue.folders(name, entry)]
            parts[name], params[name] = opened[0] if entry.class_name not in catalogue.LISTS else _unzip(opened)
        else:
            parts[name] = catalogue.open_other(entry)
    return parts, params


def _open_network(entry: Component, dtype: DTypeLike, mesh: Mesh | None, variant: str | None) -> tuple[Model, Params]:
    """One network from its folder."""
    cls = catalogue.network(entry)
    assert cls is not None
    model = cls.from_config(require_folder(entry.folder), dtype=dtype)
    shapes = model.shapes()
    params = weights.load_params(
        entry.folder,
        shapes,
        stem=model.weights_name,
        variant=variant,
        dtype=dtype,
        shardings=None if mesh is None else param_shardings(shapes, automatic(mesh)),
    )
    return model, params


def _unzip(pairs: list[tuple[Model, Params]]) -> Any:
    """A list of ``(network, parameters)`` as a tuple of networks and a tuple of parameters."""
    return tuple(zip(*pairs, strict=True))


def with_overrides(
    parts: Mapping[str, Any], params: Mapping[str, Params], given: Mapping[str, Any]
) -> tuple[Parts, dict[str, Params]]:
    """Components and parameters, with those in ``given`` replaced.

    A network is given as ``(model, params)``, a list of networks as a list of such pairs.

    Raises:
      TypeError: a network was given without parameters or in the place of another kind, or a scheduler or feature
        extractor is not one of this library.
    """
    parts, params = dict(parts), dict(params)
    for name, part in given.items():
        if is_pair(part):
            parts[name], params[name] = part
        elif isinstance(part, list | tuple) and part and all(map(is_pair, part)):
            parts[name], params[name] = _unzip(list(part))
        elif isinstance(part, list | tuple) or (isinstance(part, Model) and name not in params):
            raise TypeError(
                f"{name}: pass a network as (model, params), as its from_pretrained returns it; several as a list of "
                "such pairs"
            )
        elif name in OURS and not (isinstance(part, OURS[name]) or (part is None and name in OPTIONAL)):
            raise TypeError(
                f"{name} must be a diffuse_jax {OURS[name].__name__}, got {type(part).__module__}.{type(part).__name__}"
            )
        else:
            parts[name] = part
            if part is None:
                params.pop(name, None)
        check_role(name, parts[name])
    return parts, params


def check_role(name: str, part: Any) -> None:
    """Refuse a network of this library, or a list with one, in the place of another kind.

    Raises:
      TypeError: it says which kind it should be.
    """
    for net in part if isinstance(part, tuple | list) else (part,):
        own = isinstance(net, Model) and type(net).__module__.startswith("diffuse_jax.")
        if name in ROLES and own and not isinstance(net, ROLES[name]):
            wanted = " or ".join(kind.__name__ for kind in ROLES[name])
            raise TypeError(f"{name} must be a {wanted}, got {type(net).__name__}")


def is_pair(part: Any) -> bool:
    """Whether a component is a pair ``(network, parameters)``: an object with ``apply``, and a mapping."""
    return isinstance(part, tuple) and len(part) == 2 and hasattr(part[0], "apply") and isinstance(part[1], Mapping)


def save_components(
    folder: Path,
    parts: Mapping[str, Any],
    params: Mapping[str, Params],
    *,
    variant: str | None,
    dtype: DTypeLike | None,
) -> dict[str, tuple[str | None, str | None]]:
    """Write each component to its folder, and the members of a list to ``name``, ``name_1`` ... Folders that remain
    from an earlier save of a longer list are deleted, because they would be opened as members of this one.

    Returns:
      The entries of ``model_index.json``.

    Raises:
      ValueError: a component cannot be saved in a folder.
    """
    entries = {name: catalogue.library_and_class(part) for name, part in parts.items()}
    for name, part in parts.items():
        if isinstance(part, Model):
            part.save_pretrained(folder / name, params[name], variant=variant, dtype=dtype)
        elif isinstance(part, tuple | list):
            for k, (model, tree) in enumerate(zip(part, params[name], strict=True)):
                model.save_pretrained(folder / (f"{name}_{k}" if k else name), tree, variant=variant, dtype=dtype)
        elif part is not None:
            with naming(folder / name):
                part.save_pretrained(folder / name)
    for stale in catalogue.stale_folders(folder, parts):
        shutil.rmtree(stale)
    return entries
