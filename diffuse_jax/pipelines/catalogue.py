"""The catalogue of components: what a class name in ``model_index.json`` means here, and what we write for a component.

Networks, schedulers and pipelines are in it as soon as their class is defined, those of users too; other components
are added by :func:`register`. Opening, saving, converting, comparing and training all ask here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from diffuse_jax import models, schedulers, text  # noqa: F401  (their classes are registered when they are defined)
from diffuse_jax.models.base import Model, network_class, network_names
from diffuse_jax.schedulers import Scheduler, scheduler_class
from diffuse_jax.text.tokenizer import TOKENIZERS, open_tokenizer
from diffuse_jax.weights import Component, WeightsError
from diffuse_jax.weights.files import require_folder

LISTS = {"MultiControlNetModel": "ControlNetModel", "MultiAdapter": "T2IAdapter"}
"""Classes of PyTorch diffusers that stand for a list of networks, in the folders ``name``, ``name_1`` ..."""

NOT_LOADED: Mapping[str, str | None] = {
    "safety_checker": "images are not checked; pass safety_checker=None to confirm",
    "feature_extractor": None,
    "image_encoder": "image prompts are not available",
    "watermark": None,
}
"""Components of published folders that this library has no class for, and what their absence means for the user."""

_REGISTERED: dict[tuple[str, str], type] = {}

Class = TypeVar("Class", bound=type)


def register(cls: Class) -> Class:
    """Add a class of components that are neither networks nor schedulers, for example a tokenizer of your own.

    It needs ``from_pretrained(folder)`` and ``save_pretrained(folder)``. May be used as a decorator.

    Raises:
      TypeError: one of them is missing.
    """
    if missing := [name for name in ("from_pretrained", "save_pretrained") if not hasattr(cls, name)]:
        raise TypeError(f"{cls.__name__} has no {' and no '.join(missing)}, so its folders cannot be opened and saved")
    _REGISTERED[cls.__module__, cls.__name__] = cls
    return cls


def network(entry: Component) -> type[Model] | None:
    """The network's class that an entry names, of a list that of its members; None if it names no known network."""
    name = LISTS.get(entry.class_name, entry.class_name)
    return network_class(entry.library, name)


def is_network(entry: Component) -> bool:
    """Whether an entry is a network, or a list of networks, of a known class."""
    return network(entry) is not None


def check(name: str, entry: Component) -> None:
    """Refuse a component of an unknown class before anything is read.

    Raises:
      WeightsError: it says what is known, and what to do about a class of the user's.
    """
    folder, kind = entry.folder, entry.class_name
    if name in NOT_LOADED or is_network(entry) or kind in TOKENIZERS or (entry.library, kind) in _REGISTERED:
        return
    if kind.endswith("Scheduler") or is_scheduler(kind):
        open_scheduler(entry)
        return
    known = ", ".join((*network_names(), *TOKENIZERS))
    raise WeightsError(
        f"{folder.parent}/model_index.json: component {name!r} is a {kind!r} of {entry.library!r}; known: {known}, "
        "schedulers. If the class is yours, import the module that defines it first"
    )


def is_scheduler(class_name: str) -> bool:
    """Whether a scheduler of this name has been defined."""
    try:
        return bool(scheduler_class(class_name))
    except ValueError:
        return False


def open_scheduler(entry: Component) -> type[Scheduler]:
    """The class that the index names, which counts, as in diffusers, where the scheduler's own file names another.

    Raises:
      WeightsError: there is no such scheduler.
    """
    try:
        return scheduler_class(entry.class_name)
    except ValueError as error:
        folder = entry.folder
        raise WeightsError(
            f"{folder.parent}/model_index.json: component {folder.name!r} is an unknown {entry.class_name!r}: {error}"
        ) from error


def open_other(entry: Component) -> Any:
    """A component that is no network, from its folder: a scheduler, a tokenizer, a registered class."""
    require_folder(entry.folder)  # what opens tokenizers and schedulers would look for its name on the Hub
    if (entry.library, entry.class_name) in _REGISTERED:
        return _REGISTERED[entry.library, entry.class_name].from_pretrained(entry.folder)  # type: ignore[attr-defined]
    if entry.class_name in TOKENIZERS:
        return open_tokenizer(entry.class_name, entry.folder)
    return open_scheduler(entry).from_pretrained(entry.folder)


def folders(name: str, entry: Component) -> Iterator[Component]:
    """The entries of a component: itself, or one for each member of a list."""
    yield entry
    if entry.class_name in LISTS:
        count = 1
        last = entry.folder
        while found := [path for path in _next_in_list(entry.folder, last, name, count) if path.is_dir()]:
            last = found[0]
            yield Component(entry.library, entry.class_name, last)
            count += 1


def _next_in_list(first: Path, last: Path, name: str, count: int) -> tuple[Path, Path]:
    """Where the member ``count`` of a list may lie; diffusers saves the third T2I-Adapter as ``adapter_1_2``."""
    return first.with_name(f"{name}_{count}"), last.with_name(f"{last.name}_{count}")


def left_over(folder: Path, parts: Mapping[str, Any]) -> list[Path]:
    """Folders ``name_1``, ``name_2`` ... of a longer list of networks than the one that is saved there now."""
    found = []
    for name, part in parts.items():
        members = part if isinstance(part, tuple | list) else (part,)
        if type(members[0]).__name__ in LISTS.values():
            count = len(members)
            while (path := folder / f"{name}_{count}") and (path / "config.json").is_file() and path.name not in parts:
                found.append(path)
                count += 1
    return found


def library_and_class(part: Any) -> tuple[str | None, str | None]:
    """What ``model_index.json`` says of a component.

    Raises:
      ValueError: a list of networks that PyTorch diffusers has no name for.
    """
    if part is None:
        return None, None
    if isinstance(part, tuple | list):
        lists = {member: name for name, member in LISTS.items()}
        (kind, *others) = {type(member).__name__ for member in part}
        if others or kind not in lists:
            raise ValueError(f"a list of {', '.join((kind, *others))} cannot be saved; known are {', '.join(lists)}")
        return "diffusers", lists[kind]
    if isinstance(part, Model):
        return part.library(), type(part).__name__
    if isinstance(part, Scheduler):
        module = type(part).__module__
        return ("diffusers" if module.startswith("diffuse_jax.") else module), type(part).__name__
    module = type(part).__module__
    own = (module, type(part).__name__) in _REGISTERED
    return (module if own else "transformers"), type(part).__name__
