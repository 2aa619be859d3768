"""The catalogue of components: maps class names in ``model_index.json`` to our classes, and back when saving.

Networks, schedulers and pipelines, including those of users, are registered when their class is defined; other
components with :func:`register`. Opening, saving, conversion, parity checks and training all use this catalogue.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from diffuse_jax import models, schedulers, text  # noqa: F401  (their classes are registered when they are defined)
from diffuse_jax.models.base import Model, network_class, network_names
from diffuse_jax.processors import CLIPImageProcessor, DPTImageProcessor, ImageProcessor
from diffuse_jax.schedulers import Scheduler, scheduler_class
from diffuse_jax.text.tokenizer import TOKENIZERS, open_tokenizer
from diffuse_jax.weights import Component, WeightsError
from diffuse_jax.weights.files import require_folder

LISTS = {"MultiControlNetModel": "ControlNetModel", "MultiAdapter": "T2IAdapter"}
"""Classes of PyTorch diffusers that are lists of networks, stored in the folders ``name``, ``name_1`` ... -> class of
the members."""

NOT_LOADED = ("watermark", "watermarker")
"""Components of published folders that are not loaded."""

OPTIONAL = ("image_encoder", "feature_extractor", "safety_checker", "depth_estimator", "inverse_scheduler")
"""Components that any pipeline may have and none needs for text to image; training leaves them in their folders."""


def not_downloaded(given: Iterable[str]) -> tuple[str, ...]:
    """Folders of a pipeline on the Hub that are not needed, where the caller gives (or leaves out) these components."""
    return (*NOT_LOADED, *(name for name in OPTIONAL if name in {*given}))


PROCESSORS: Mapping[str, type[ImageProcessor]] = {
    f"{kind}{suffix}": ours
    for kind, ours in (("CLIP", CLIPImageProcessor), ("DPT", DPTImageProcessor))
    for suffix in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
}
"""Classes of transformers that prepare images -> ours. The suffix depends on the release and on what is installed."""

_REGISTERED: dict[tuple[str, str], type] = {}

Class = TypeVar("Class", bound=type)


def register(cls: Class) -> Class:
    """Register a component class that is neither a network nor a scheduler, for example a custom tokenizer.

    The class needs ``from_pretrained(folder)`` and ``save_pretrained(folder)``. Can be used as a decorator.

    Raises:
      TypeError: one of these methods is missing.
    """
    if missing := [name for name in ("from_pretrained", "save_pretrained") if not hasattr(cls, name)]:
        raise TypeError(f"{cls.__name__} has no {' and no '.join(missing)}, so it can be neither opened nor saved")
    _REGISTERED[cls.__module__, cls.__name__] = cls
    return cls


def network(entry: Component) -> type[Model] | None:
    """The network class that an entry names (for a list, the class of its members); None if it is not a known
    network."""
    name = LISTS.get(entry.class_name, entry.class_name)
    return network_class(entry.library, name)


def is_network(entry: Component) -> bool:
    """Whether an entry names a known network class, or a list of such networks."""
    return network(entry) is not None


def check(name: str, entry: Component) -> None:
    """Check that the class of a component is known, before anything is read.

    Raises:
      WeightsError: it is not; the message lists the known classes and says how to register a custom one.
    """
    folder, kind = entry.folder, entry.class_name
    if name in NOT_LOADED or is_network(entry) or (entry.library, kind) in _REGISTERED:
        return
    if kind in TOKENIZERS or kind in PROCESSORS:
        return
    if kind.endswith("Scheduler") or is_scheduler(kind):
        open_scheduler(entry)
        return
    known = ", ".join((*network_names(), *TOKENIZERS, *PROCESSORS))
    raise WeightsError(
        f"{folder.parent}/model_index.json: component {name!r} is a {kind!r} of {entry.library!r}; known classes: "
        f"{known}, schedulers. For a custom class, import the module that defines it first"
    )


def is_scheduler(class_name: str) -> bool:
    """Whether a scheduler of this name has been defined."""
    try:
        return bool(scheduler_class(class_name))
    except ValueError:
        return False


def open_scheduler(entry: Component) -> type[Scheduler]:
    """The scheduler class that the index names. As in diffusers, it takes precedence over the class that the
    scheduler's own config names.

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
    """Open a component that is not a network from its folder: a scheduler, a tokenizer or a registered class."""
    require_folder(entry.folder)  # a missing folder would otherwise be looked up on the Hub
    if (entry.library, entry.class_name) in _REGISTERED:
        return _REGISTERED[entry.library, entry.class_name].from_pretrained(entry.folder)  # type: ignore[attr-defined]
    if entry.class_name in PROCESSORS:
        return PROCESSORS[entry.class_name].from_pretrained(entry.folder)
    if entry.class_name in TOKENIZERS:
        return open_tokenizer(entry.class_name, entry.folder)
    return open_scheduler(entry).from_pretrained(entry.folder)


def folders(name: str, entry: Component) -> Iterator[Component]:
    """The entries of a component: the entry itself, and for a list one per further member."""
    yield entry
    if entry.class_name in LISTS:
        count = 1
        last = entry.folder
        while found := [path for path in _next_in_list(entry.folder, last, name, count) if path.is_dir()]:
            last = found[0]
            yield Component(entry.library, entry.class_name, last)
            count += 1


def _next_in_list(first: Path, last: Path, name: str, count: int) -> tuple[Path, Path]:
    """Where the member ``count`` of a list may be; diffusers saves the third T2I-Adapter as ``adapter_1_2``."""
    return first.with_name(f"{name}_{count}"), last.with_name(f"{last.name}_{count}")


def stale_folders(folder: Path, parts: Mapping[str, Any]) -> list[Path]:
    """Folders ``name_1``, ``name_2`` ... that remain from an earlier save of a longer list of networks."""
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
    """The library and class name of a component in ``model_index.json``.

    Raises:
      ValueError: PyTorch diffusers has no class for this list of networks.
    """
    if part is None:
        return None, None
    if isinstance(part, tuple | list):
        lists = {member: name for name, member in LISTS.items()}
        (kind, *others) = {type(member).__name__ for member in part}
        if others or kind not in lists:
            raise ValueError(
                f"a list of {', '.join((kind, *others))} cannot be saved; known lists are of {', '.join(lists)}"
            )
        return "diffusers", lists[kind]
    if isinstance(part, Model):
        return part.library(), type(part).__name__
    if isinstance(part, Scheduler):
        module = type(part).__module__
        return ("diffusers" if module.startswith("diffuse_jax.") else module), type(part).__name__
    module = type(part).__module__
    registered = (module, type(part).__name__) in _REGISTERED
    return (module if registered else "transformers"), type(part).__name__
