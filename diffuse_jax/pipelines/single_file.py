"""Open the components of a pipeline from a single file in the layout of the original checkpoints."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from jax.typing import DTypeLike

from diffuse_jax import layouts, weights
from diffuse_jax.errors import parsing
from diffuse_jax.models import Model, Params
from diffuse_jax.models.base import network_class
from diffuse_jax.pipelines.catalogue import NOT_LOADED
from diffuse_jax.pipelines.opening import Parts, is_pair, with_overrides
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.sharding import automatic, param_shardings
from diffuse_jax.text.tokenizer import clip_tokenizer
from diffuse_jax.weights import WeightsError

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
"""The Hub repository of the vocabulary that all Stable Diffusion models share; single files do not contain it."""

PAD_WITH_EXCLAMATION_MARK = {("v2", "tokenizer"), ("xl", "tokenizer_2"), ("xl-refiner", "tokenizer_2")}
"""``(family, component)`` of tokenizers that pad with "!" (id 0), as OpenCLIP was trained, not with the end token."""


class Contents(NamedTuple):
    """The contents of a file, as a pipeline's folder would hold them."""

    class_name: str
    parts: Parts
    params: dict[str, Params]
    options: dict[str, Any]


def open_single_file(
    path: str | Path,
    *,
    dtype: DTypeLike,
    mesh: Mesh | None,
    tokenizer: Any,
    prediction_type: str | None,
    components: Mapping[str, Any],
    **hub: Any,
) -> Contents:
    """The components of a file; see :meth:`DiffusionPipeline.from_single_file`."""
    given = {name: part for name, part in components.items() if name not in NOT_LOADED}
    configs = {name: part[0].config_json() if is_model(part) else {} for name, part in given.items()}
    file = layouts.read_single_file(path, prediction_type=prediction_type, given=configs)
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
    params: dict[str, Params] = {}
    for name in wanted:
        shardings = None if mesh is None else param_shardings(shapes[name], automatic(mesh))
        params[name] = weights.place(views[name], dtype=dtype, shardings=shardings)
    return Contents(file.class_name, *with_overrides(parts, params, given), file.options)


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
    names = [name.replace("text_encoder", "tokenizer") for name in layouts.FAMILIES[file.family].text]
    return {name: given.get(name) or open_tokenizer(source, (file.family, name), **hub) for name in names}


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
