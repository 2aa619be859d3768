"""Open the components of a pipeline from a single file in the layout of the original checkpoints."""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffuse_jax import layouts, weights
from diffuse_jax.errors import parsing
from diffuse_jax.messages import warn
from diffuse_jax.models import Model, Params
from diffuse_jax.models.base import floating_type, network_class
from diffuse_jax.models.one_file import casting, in_host_memory, safetensors_path
from diffuse_jax.pipelines.catalogue import NOT_LOADED, OPTIONAL
from diffuse_jax.pipelines.opening import Parts, is_pair, with_overrides
from diffuse_jax.processors import DPTImageProcessor
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.sharding import automatic, param_shardings
from diffuse_jax.text.tokenizer import clip_tokenizer
from diffuse_jax.weights import WeightsError

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
"""The Hub repository of the vocabulary that all Stable Diffusion models share; single files do not contain it."""

PAD_WITH_EXCLAMATION_MARK = {
    *((family, "tokenizer") for family in ("v2", "v2-depth", "v2-turbo")),
    *((family, "tokenizer_2") for family in ("xl", "xl-refiner")),
}
"""``(family, component)`` of tokenizers that pad with "!" (id 0), as OpenCLIP was trained, not with the end token."""

NOT_IN_FILES = {*OPTIONAL} - {name for family in layouts.FAMILIES.values() for name in family.places}
"""Optional components that no layout of single files has a place for."""


class Contents(NamedTuple):
    """The contents of a file, as a pipeline's folder would hold them."""

    parts: Parts
    params: dict[str, Params]


def read_file(
    path: str | Path, components: Mapping[str, Any], *, prediction_type: str | None, ema: bool
) -> layouts.SingleFile:
    """What a file holds besides what the caller gives; see :meth:`DiffusionPipeline.from_single_file`."""
    given = {name: part for name, part in components.items() if name not in NOT_LOADED}
    configs = {name: part[0].config_json() if is_model(part) else {} for name, part in given.items()}
    return layouts.read_single_file(path, prediction_type=prediction_type, ema=ema, given=configs)


def refuse_other(target: Any, own: Any, file: layouts.SingleFile, components: Collection[str], path: Any) -> None:
    """Refuse to open a file with a pipeline that does not fit it.

    Args:
      target: the pipeline class.
      own: the class of the file itself, of whose family ``target`` must be.
      file: what the file holds.
      components: names of the components that the caller gives.
      path: the file, for messages.

    Raises:
      TypeError: the file lacks a component of this class, has unused ones, or its UNet is of another task; or the
        caller gives a component that the pipeline does not have.
    """
    family, used = layouts.FAMILIES[file.family], getattr(target.family, "encoders", {})
    have = {*family.places, *map(tokenizer_of, family.text), *file.schedulers}
    problem = ""
    if missing := [name for name in target.required if name not in {*have, *components}]:
        problem = f", which needs {', '.join(missing)} as well"
    elif unused := [name for name in family.text if used and name not in used]:
        problem = f", which does not use {', '.join(unused)}"
    special = file.class_name != family.pipelines[min(family.pipelines)]
    related = issubclass(target, own) or ("Inpaint" in own.__name__ and "Inpaint" in target.__name__)
    if problem or (special and not related):
        raise TypeError(
            f"{path} contains a {own.__name__}, not a {target.__name__}{problem}; DiffusionPipeline.from_single_file "
            "chooses the right class"
        )
    known = {*have, *target.required, *used, *map(tokenizer_of, used), *NOT_LOADED, *OPTIONAL}
    if unknown := sorted({*components} - known):
        raise TypeError(f"{target.__name__} has no component {', '.join(unknown)}; it has {', '.join(sorted(known))}")


def open_single_file(
    path: str | Path,
    file: layouts.SingleFile,
    *,
    dtype: DTypeLike,
    mesh: Mesh | None,
    tokenizer: Any,
    components: Mapping[str, Any],
    **hub: Any,
) -> Contents:
    """The components of a file; see :meth:`DiffusionPipeline.from_single_file`."""
    given = {name: part for name, part in components.items() if name not in NOT_LOADED}
    wanted = file.networks
    models = {name: open_model(path, part, dtype) for name, part in wanted.items()}
    shapes = {name: model.shapes() for name, model in models.items()}
    # Every name and shape of every network is checked before the first tensor is read.
    views = {
        name: weights.match(part.checkpoint, shapes[name], label=f"{path}: {name}") for name, part in wanted.items()
    }
    parts: dict[str, Any] = dict(models)
    parts |= open_tokenizers(file, tokenizer, components, **hub)
    with parsing(path):
        parts |= {name: Scheduler.from_config(config) for name, config in file.schedulers.items()}
    if "depth_estimator" in wanted:
        edge = models["depth_estimator"].config.image_size
        parts["feature_extractor"] = DPTImageProcessor(size=(edge, edge), resample=2)
    params: dict[str, Params] = {}
    for name in wanted:
        shardings = None if mesh is None else param_shardings(shapes[name], automatic(mesh))
        params[name] = weights.place(views[name], dtype=dtype, shardings=shardings)
    return Contents(*with_overrides(parts, params, given))


def is_model(part: Any) -> bool:
    """Whether a component was given as a pair of a network of this library and its parameters."""
    return is_pair(part) and isinstance(part[0], Model)


def open_model(path: str | Path, part: layouts.Part, dtype: DTypeLike) -> Any:
    """The network for one part of a file, without parameters."""
    cls = network_class(part.library, part.class_name)
    if cls is None:
        raise WeightsError(f"{path}: contains a {part.class_name!r}, which is not supported")
    try:
        model = cls.from_config(part.config, dtype=dtype)
        model.shapes()
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise WeightsError(f"{path}: {part.class_name}: its tensors fit no valid network ({error})") from error
    return model


def open_tokenizers(
    file: layouts.SingleFile, source: Any, given: Mapping[str, Any] = types.MappingProxyType({}), **hub: Any
) -> dict[str, Any]:
    """Component name -> tokenizer, for each text encoder of a file.

    Args:
      file: the file being opened.
      source: see :func:`open_tokenizer`.
      given: components that the caller passed; their tokenizers are used.
      **hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
      WeightsError: there is no tokenizer at the source.
    """
    names = [tokenizer_of(name) for name in layouts.FAMILIES[file.family].text]
    return {name: given.get(name) or open_tokenizer(source, (file.family, name), **hub) for name in names}


def tokenizer_of(encoder: str) -> str:
    """The component that a text encoder's tokenizer is."""
    return encoder.replace("text_encoder", "tokenizer")


def open_tokenizer(source: Any, key: tuple[str, str], **hub: Any) -> Any:
    """The CLIP tokenizer from a folder or a Hub id (None: ``CLIP_TOKENIZER``), padding as the encoder expects.

    ``key`` is its ``(family, component)``.
    """
    pad = {"pad_token": "!"} if key in PAD_WITH_EXCLAMATION_MARK else {}
    try:
        return clip_tokenizer(CLIP_TOKENIZER if source is None else source, **pad, **hub)
    except WeightsError as error:
        raise WeightsError(
            f"a single file holds no tokenizer, and none was found at {source or CLIP_TOKENIZER} ({error}); "
            "pass a folder or Hub id with CLIP's vocab.json and merges.txt as tokenizer="
        ) from error


def save_single_file(pipe: Any, path: str | Path, dtype: DTypeLike | None) -> Path:
    """Write a pipeline's networks to one file; see :meth:`DiffusionPipeline.save_single_file`."""
    path, dtype = safetensors_path(path), None if dtype is None else floating_type(dtype)
    if left := [name for name in pipe.params if name in NOT_IN_FILES]:
        warn(f"a single file has no place for {', '.join(left)}, which is left out")
    parts = {name: part for name, part in pipe.components.items() if part is not None and name not in NOT_IN_FILES}
    configs = {name: part.config_json() for name, part in parts.items() if isinstance(part, Model)}
    schedulers = {name: part.to_json() for name, part in parts.items() if isinstance(part, Scheduler)}
    family = layouts.family_for(configs, schedulers)
    tensors = {name: in_host_memory(pipe.params[name]) for name in configs}
    layouts.write_single_file(path, tensors, family, casting(dtype), configs=configs, schedulers=schedulers)
    return path
