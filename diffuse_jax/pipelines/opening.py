"""From folders and files to components and parameters, and back; nothing here knows what a pipeline does."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffuse_jax import weights
from diffuse_jax.messages import warn
from diffuse_jax.models import Model, Params
from diffuse_jax.pipelines import catalogue
from diffuse_jax.pipelines.catalogue import NOT_LOADED
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.sharding import automatic, param_shardings
from diffuse_jax.weights import Component
from diffuse_jax.weights.files import require_folder, unchanged
from diffuse_jax.writing import naming

Parts = dict[str, Any]
"""Component name -> network, tuple of networks, scheduler, tokenizer or None."""


def refuse_family(target: Any, index: weights.PipelineIndex, given: Collection[str], source: Any) -> None:
    """Refuse a checkpoint that is conditioned by text encoders which a pipeline of another family would not use.

    Raises:
      TypeError: naming the class to open it with.
    """
    encoders = getattr(target.family, "encoders", None)
    entries = [name for name in index.components if name.startswith("text_encoder") and name not in given]
    if encoders is not None and (unused := [name for name in entries if name not in encoders]):
        raise TypeError(
            f"{source} is a {index.class_name} with {', '.join(unused)}, which {target.__name__} does not use; open it "
            "with DiffusionPipeline or AutoPipelineForText2Image, which choose the class"
        )


def open_components(
    index: weights.PipelineIndex,
    given: Mapping[str, Any],
    *,
    dtype: DTypeLike,
    mesh: Mesh | None,
    variant: str | None,
) -> tuple[Parts, dict[str, Params]]:
    """The components of a folder and the parameters of its networks, with those that the caller gave.

    Raises:
      WeightsError: an unknown class, or weights that do not fit; every class is checked before anything is read.
      TypeError: a given component is of the wrong kind.
    """
    wanted = {name: entry for name, entry in index.components.items() if name not in given}
    for name, entry in wanted.items():
        catalogue.check(name, entry)
    read = [name for name in wanted if name not in NOT_LOADED]
    folders = [entry.folder for name in read for entry in catalogue.folders(name, wanted[name])]
    with unchanged(*folders, *{folder.parent / weights.index.FILE for folder in folders}):
        parts, params = _open(wanted, mesh, dtype, variant)
    return with_given(dict.fromkeys(index.absent) | parts, params, given)


def _open(
    wanted: Mapping[str, Component], mesh: Mesh | None, dtype: DTypeLike, variant: str | None
) -> tuple[Parts, dict[str, Params]]:
    parts: Parts = {}
    params: dict[str, Params] = {}
    for name, entry in wanted.items():
        if name in NOT_LOADED:
            parts[name] = None
            if NOT_LOADED[name]:
                warn(f"{name} ({entry.class_name}) is not loaded: {NOT_LOADED[name]}")
        elif catalogue.is_network(entry):
            opened = [_open_network(e, dtype, mesh, variant) for e in catalogue.folders(name, entry)]
            parts[name], params[name] = opened[0] if entry.class_name not in catalogue.LISTS else _columns(opened)
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


def _columns(pairs: list[tuple[Model, Params]]) -> Any:
    """Pairs of a network and its parameters as a tuple of networks and a tuple of parameters."""
    return tuple(zip(*pairs, strict=True))


def with_given(
    parts: Mapping[str, Any], params: Mapping[str, Params], given: Mapping[str, Any]
) -> tuple[Parts, dict[str, Params]]:
    """Components and parameters with those that the caller gave.

    A network comes as ``(model, params)``, a list of networks as a list of such pairs.

    Raises:
      TypeError: a network came without parameters, or what came is not of this library.
    """
    parts, params = dict(parts), dict(params)
    for name, part in given.items():
        if is_pair(part):
            parts[name], params[name] = part
        elif isinstance(part, list | tuple) and part and all(map(is_pair, part)):
            parts[name], params[name] = _columns(list(part))
        elif isinstance(part, list | tuple) or (isinstance(part, Model) and name not in params):
            raise TypeError(
                f"{name}: give a network as (model, params), as its from_pretrained returns it; several as a list of "
                "such pairs"
            )
        elif name == "scheduler" and not isinstance(part, Scheduler):
            raise TypeError(f"scheduler must be one of diffuse_jax, got {type(part).__module__}.{type(part).__name__}")
        else:
            parts[name] = part
            if part is None:
                params.pop(name, None)
    return parts, params


def is_pair(part: Any) -> bool:
    """Whether a component came as ``(network, parameters)``: anything that can be applied, and a mapping."""
    return isinstance(part, tuple) and len(part) == 2 and hasattr(part[0], "apply") and isinstance(part[1], Mapping)


def save_components(
    folder: Path,
    parts: Mapping[str, Any],
    params: Mapping[str, Params],
    *,
    variant: str | None,
    dtype: DTypeLike | None,
) -> dict[str, tuple[str | None, str | None]]:
    """Write every component into its folder, those of a list into ``name``, ``name_1`` ...; what an older save left of
    a longer list is removed, because it would be opened as part of this one.

    Returns:
      The entries of ``model_index.json``.

    Raises:
      ValueError: a component that a folder cannot hold.
    """
    entries = {name: catalogue.library_and_class(part) for name, part in parts.items()}
    for name, part in parts.items():
        if isinstance(part, Model):
            part.save_pretrained(folder / name, params[name], variant=variant, dtype=dtype)
        elif isinstance(part, tuple | list):
            for k, (model, own) in enumerate(zip(part, params[name], strict=True)):
                model.save_pretrained(folder / (f"{name}_{k}" if k else name), own, variant=variant, dtype=dtype)
        elif part is not None:
            with naming(folder / name):
                part.save_pretrained(folder / name)
    for left_over in catalogue.left_over(folder, parts):
        shutil.rmtree(left_over)
    return entries
