"""``model_index.json``: the components of a pipeline and their folders, checked before anything is opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffuse_jax.errors import bad
from diffuse_jax.limits import refuse_links
from diffuse_jax.weights.files import is_plain_name, read_json, write_json
from diffuse_jax.writing import expanded

FILE = "model_index.json"

VERSION = "0.42.1"
"""The version of diffusers in whose format new folders are written; some of its pipelines do not open without one."""


@dataclasses.dataclass(frozen=True)
class Component:
    """One entry of the index: its library (diffusers, transformers), class (without a leading ``Flax``) and folder."""

    library: str
    class_name: str
    folder: Path


@dataclasses.dataclass(frozen=True)
class PipelineIndex:
    """The contents of ``model_index.json``.

    Attributes:
      class_name: the pipeline's class, without the ``Flax`` prefix of old Flax folders.
      components: name -> component, without the empty entries (``[null, null]``).
      absent: names of the empty entries, such as a safety checker that was removed.
      options: all other values (``requires_safety_checker``, ``force_zeros_for_empty_prompt`` ...); the version only
        where it is another than :data:`VERSION`.
    """

    class_name: str
    components: dict[str, Component]
    absent: tuple[str, ...]
    options: dict[str, Any]


def read_index(folder: Path | str) -> PipelineIndex:
    """Read and check ``model_index.json`` of a local folder.

    Raises:
      WeightsError: the file is missing or malformed, or a component's name would lead out of the folder.
    """
    folder = Path(folder)
    file = folder / FILE
    if file.is_symlink():
        refuse_links(folder)
    data = read_json(file)
    class_name = data.pop("_class_name", None)
    if not isinstance(class_name, str):
        raise bad(file, "does not name the pipeline's class ('_class_name')")
    if data.get("_diffusers_version") == VERSION:  # every folder that is written here gets it
        del data["_diffusers_version"]
    entries = {name: value for name, value in data.items() if _is_component(value)}
    components = {name: _component(folder, name, value) for name, value in entries.items() if value[1] is not None}
    return PipelineIndex(
        class_name=class_name.removeprefix("Flax"),
        components=components,
        absent=tuple(name for name, value in entries.items() if value[1] is None),
        options={name: value for name, value in data.items() if name not in entries},
    )


def _is_component(value: Any) -> bool:
    """Whether a value is a component: a pair of library and class, or of nulls."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str | None) for v in value)


def _component(folder: Path, name: str, value: list[Any]) -> Component:
    file = folder / FILE
    if not is_plain_name(name):
        raise bad(file, f"component {name!r} is not the plain name of a subfolder")
    if not all(isinstance(word, str) for word in value):
        raise bad(file, f"component {name!r} has a class but no library: {value}")
    return Component(value[0], value[1].removeprefix("Flax"), folder / name)


def write_index(
    folder: Path | str,
    class_name: str,
    components: Mapping[str, tuple[str | None, str | None]],
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model_index.json``.

    Args:
      folder: the pipeline's folder.
      class_name: the pipeline's class in diffusers.
      components: name -> (library, class), or ``(None, None)`` for an absent component.
      options: further values.

    Raises:
      WeightsError: a component's name is not a plain folder name.
    """
    file = expanded(folder) / FILE
    for name in components:
        if not is_plain_name(name):
            raise bad(file, f"component {name!r} is not the plain name of a subfolder")
    entries = {name: list(entry) for name, entry in components.items()}
    write_json(file, {"_class_name": class_name, "_diffusers_version": VERSION, **(options or {}), **entries})
    return file
