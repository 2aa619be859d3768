"""Converting a checkpoint to another layout, and verifying that nothing was lost.

    convert("sd-v1-5.safetensors", "sd15", to="diffusers", dtype="bfloat16")

The result is written under a temporary name, read back and compared bit for bit with its source, and only then renamed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from diffuse_jax import layouts, weights
from diffuse_jax.errors import parsing
from diffuse_jax.limits import refuse_links
from diffuse_jax.messages import warn
from diffuse_jax.models import Model
from diffuse_jax.models.base import floating_type, network_class, network_names
from diffuse_jax.pipelines import catalogue
from diffuse_jax.pipelines.single_file import CLIP_TOKENIZER, NOT_IN_FILES, open_tokenizers
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.weights import WeightsError, names
from diffuse_jax.weights.copy import compact, forget
from diffuse_jax.weights.files import STEMS, unchanged
from diffuse_jax.weights.msgpack import write_msgpack
from diffuse_jax.weights.save import save_tensors
from diffuse_jax.writing import expanded, naming, only_writer

LAYOUTS = ("diffusers", "flax-msgpack", "single-file")
SCHEDULER = "scheduler_config.json"
LEFT_OUT = set(catalogue.NOT_LOADED)
"""Components that this library has no class for; the converted index lists them as absent."""

Views = dict[names.Path, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of the source: its library, model, configuration and tensors (views of the files)."""

    library: str
    model: Model
    config: dict[str, Any]
    views: Views


@dataclasses.dataclass(frozen=True)
class OpenedCheckpoint:
    """Everything that is converted.

    Attributes:
      class_name: the pipeline's class; empty if the source is one network's folder.
      networks: component name -> network.
      folders: component name -> (library, class, folder) of the tokenizers and schedulers, whose folders are copied.
      schedulers: component name -> configuration of the schedulers without a folder.
      tokenizers: component name -> tokenizer, for tokenizers without a folder.
      absent: names of the components that are left out.
      options: other values of ``model_index.json``.
      lists: component name -> index entry of each list of networks; ``networks`` has their members by folder name.
    """

    class_name: str
    networks: dict[str, Network]
    folders: dict[str, weights.Component] = dataclasses.field(default_factory=dict)
    schedulers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    tokenizers: dict[str, Any] = dataclasses.field(default_factory=dict)
    absent: tuple[str, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    lists: dict[str, weights.Component] = dataclasses.field(default_factory=dict)


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "diffusers",
    dtype: DTypeLike | None = None,
    *,
    variant: str | None = None,
    prediction_type: str | None = None,
    tokenizer: str | Path | None = None,
) -> Path:
    """Convert a checkpoint to another layout and verify the result.

    Args:
      src: the folder of a pipeline or of one network in diffusers layout (safetensors, ``.bin`` or ``.msgpack``), a Hub
        id, or a ``.safetensors`` or ``.ckpt`` file of a pipeline or of one network in the original layout.
      dst: the folder to write, or the file for ``single-file``. It must not exist, except as an empty folder.
      to: ``"diffusers"`` (safetensors, PyTorch's names), ``"flax-msgpack"`` (the folders of old Flax releases) or
        ``"single-file"`` (the original layout, for pipelines of Stable Diffusion 1.x, 2.x and XL, and for networks
        that have :meth:`~diffuse_jax.models.one_file.OneFile.save_single_file`).
      dtype: the dtype to cast floating-point tensors to; None leaves them unchanged.
      variant: which weight files of the source to read, for example ``"fp16"``.
      prediction_type: for a single file; see :func:`diffuse_jax.layouts.read_single_file`.
      tokenizer: a folder or Hub id with the tokenizer, which single files do not contain, for example
        ``"openai/clip-vit-large-patch14"``. Without it, the new folder has no tokenizer, and a warning says so.

    Returns:
      ``dst``.

    Raises:
      WeightsError: the source cannot be read or does not fit its configuration, the layout cannot hold it, or the
        result differs from the source. Nothing is left behind.
      ValueError: an unknown layout or dtype, a single file whose name does not end in ``.safetensors``, or a
        ``tokenizer`` for a conversion that needs none.
      FileExistsError: ``dst`` already exists, or another process is writing it.
      OSError: ``dst`` cannot be written; names the file.
    """
    if to not in LAYOUTS:
        raise ValueError(f"to must be one of {', '.join(LAYOUTS)}, got {to!r}")
    dst = expanded(dst)
    if to == "single-file" and dst.suffix != ".safetensors":
        raise ValueError(f"a single file is written as safetensors; {dst} does not end in .safetensors")
    refuse_existing(dst, to)
    if tokenizer is not None and (to == "single-file" or not expanded(src).is_file()):
        raise ValueError("tokenizer= is only for converting a single file to a folder; a folder has its own")
    dtype = None if dtype is None else floating_type(dtype)
    with finished(dst, to) as partial, unchanged(*places(expanded(src))):
        source = open_source(src, variant=variant, prediction_type=prediction_type, tokenizer=tokenizer)
        if expanded(src).is_file() and source.class_name and to != "single-file" and tokenizer is None:
            warn(
                f"{src} holds no tokenizer, so {dst} will not have one, but pipelines need it; pass tokenizer= "
                f"(--tokenizer), for example {CLIP_TOKENIZER!r}"
            )
        source = without_optional(source) if to == "single-file" else source
        WRITERS[to](source, partial, dtype)
        _verify(source, partial, to, dtype)
    return dst


def places(src: Path) -> list[Path]:
    """A source's file, or its folder and its components' folders; none for a Hub id, whose files do not change."""
    below = [path for path in src.iterdir() if path.is_dir()] if src.is_dir() else []
    return [src, *below] if src.exists() else []


@contextmanager
def finished(dst: Path, to: str) -> Iterator[Path]:
    """A path in a temporary folder beside ``dst``; if the block succeeds, what it wrote there is renamed to ``dst``.

    Raises:
      FileExistsError: another process is writing ``dst``, or has written it in the meantime.
    """
    with only_writer(dst) as folder:
        refuse_existing(dst, to)  # another process may have finished in the meantime
        partial = folder / dst.name
        yield partial
        refuse_existing(dst, to)
        if dst.is_dir():
            dst.rmdir()
        partial.rename(dst)


def refuse_existing(dst: Path, to: str) -> None:
    """Refuse to overwrite ``dst``; an empty folder is accepted if a folder will replace it."""
    empty = to != "single-file" and dst.is_dir() and not dst.is_symlink() and not any(dst.iterdir())
    if os.path.lexists(dst) and not empty:
        raise FileExistsError(f"{dst} exists; remove it or choose another path")


def open_source(
    src: str | Path,
    *,
    variant: str | None = None,
    prediction_type: str | None = None,
    tokenizer: str | Path | None = None,
) -> OpenedCheckpoint:
    """Find, open and check a checkpoint in any layout; tensors stay in their files until they are used."""
    if expanded(src).is_file():
        return _open_single_file(expanded(src), prediction_type, tokenizer)
    folder = weights.resolve(src, variant=variant, skip=LEFT_OUT)
    if not os.path.lexists(folder / "model_index.json"):
        config = weights.read_json(folder / "config.json")
        kind = config.get("_class_name") or (config.get("architectures") or [""])[0]
        return OpenedCheckpoint("", {"": _open_network("", str(kind), folder, folder / "config.json", variant)})
    index = weights.read_index(folder)
    networks, folders = {}, {}
    for name, entry in index.components.items():
        if name in LEFT_OUT:
            continue
        if not catalogue.is_network(entry) and not _has_weights(entry.folder):
            if not entry.folder.is_dir():
                raise WeightsError(f"{entry.folder}: no such folder, but model_index.json names a {entry.class_name}")
            if os.path.lexists(entry.folder / SCHEDULER):
                weights.read_json(entry.folder / SCHEDULER)  # before anything is copied
            folders[name] = entry
            continue
        kind = catalogue.LISTS.get(entry.class_name, entry.class_name)
        for member in catalogue.folders(name, entry):
            networks[member.folder.name] = _open_network(
                entry.library, kind, member.folder, folder / "model_index.json", variant
            )
    if not networks:
        raise WeightsError(f"{folder / 'model_index.json'}: names no network, so there is nothing to convert")
    lists = {name: entry for name, entry in index.components.items() if entry.class_name in catalogue.LISTS}
    absent = (*index.absent, *sorted(LEFT_OUT & set(index.components)))
    return OpenedCheckpoint(index.class_name, networks, folders, absent=absent, options=index.options, lists=lists)


def without_optional(source: OpenedCheckpoint) -> OpenedCheckpoint:
    """The checkpoint without the networks that no single file has a place for, which is said in a warning."""
    if left := [name for name in source.networks if name in NOT_IN_FILES]:
        warn(f"a single file has no place for {', '.join(left)}, which is left out")
    kept = {name: network for name, network in source.networks.items() if name not in left}
    return dataclasses.replace(source, networks=kept)


def _has_weights(folder: Path) -> bool:
    endings = {".safetensors", ".bin", ".msgpack", ".ckpt", ".pt"}
    return folder.is_dir() and any(path.suffix.lower() in endings for path in folder.iterdir())


def _open_network(library: str, kind: str, folder: Path, named_in: Path, variant: str | None) -> Network:
    """A network from its folder, matched against the shapes of its class."""
    cls = _class(library, kind, named_in)
    model = cls.from_config(folder)
    checkpoint = weights.read_checkpoint(weights.weight_files(folder, cls.weights_name, variant))
    views = weights.match(checkpoint, model.shapes(), label=str(folder))
    return Network(library, model, weights.read_json(folder / "config.json"), views)


def _class(library: str, kind: str, named_in: Path) -> type[Model]:
    found = network_class(library, kind.removeprefix("Flax"))
    if found is None:
        raise WeightsError(f"{named_in}: cannot convert a {kind!r}; known are {', '.join(network_names())}")
    return found


def _open_single_file(path: Path, prediction_type: str | None, tokenizer: str | Path | None) -> OpenedCheckpoint:
    """A pipeline from a single file, which contains no tokenizers, or one network."""
    _, tensors = layouts.open_file(path)
    if kind := layouts.network_in(tensors):
        if tokenizer is not None or prediction_type is not None:
            raise ValueError(f"{path} holds only a {kind}; a tokenizer and a prediction type belong to whole pipelines")
        return OpenedCheckpoint("", _networks({"": layouts.read_network(path, kind, tensors=tensors)}, path))
    file = layouts.read_single_file(path, prediction_type=prediction_type, tensors=tensors)
    tokenizers = {} if tokenizer is None else open_tokenizers(file, tokenizer)
    networks = _networks(file.networks, path)
    with parsing(path):  # the file's metadata may hold a configuration that no scheduler has
        for config in file.schedulers.values():
            Scheduler.from_config(config)
    return OpenedCheckpoint(
        file.class_name, networks, schedulers=file.schedulers, tokenizers=tokenizers, options=file.options
    )


def _networks(parts: Mapping[str, layouts.Part], path: Path) -> dict[str, Network]:
    """The networks of a single file, matched against the shapes of their classes."""
    networks = {}
    for name, part in parts.items():
        cls = _class(part.library, part.class_name, path)
        try:
            model = cls.from_config(part.config)
            shapes = model.shapes()
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise WeightsError(f"{path}: {name}: the shapes of its tensors do not form a network ({error})") from error
        views = weights.match(part.checkpoint, shapes, label=f"{path}: {name}")
        networks[name] = Network(part.library, model, part.config, views)
    return networks


def _dtype(array: np.ndarray, dtype: DTypeLike | None) -> np.dtype:
    """The dtype a tensor is written in."""
    return jnp.dtype(dtype) if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating) else array.dtype


def _write_diffusers(source: OpenedCheckpoint, dst: Path, dtype: DTypeLike | None) -> None:
    for name, network in source.networks.items():
        tensors = names.torch_tensors(network.views)
        specs = {key: (_dtype(array, dtype), array.shape) for key, array in sorted(tensors.items())}
        save_tensors(dst / name, specs, functools.partial(_read, tensors, dtype), network.model.weights_name)
        head = {"_class_name": type(network.model).__name__} if "_class_name" in network.config else {}
        weights.write_json(dst / name / "config.json", network.config | architectures(network) | head)
    write_rest(source, dst, "")


def architectures(network: Network, prefix: str = "") -> dict[str, Any]:
    """The class name in transformers' form; networks of diffusers have ``_class_name`` instead."""
    return {"architectures": [prefix + type(network.model).__name__]} if network.model.model_type else {}


def _write_flax(source: OpenedCheckpoint, dst: Path, dtype: DTypeLike | None) -> None:
    for name, network in source.networks.items():
        old = {_old_flax(path): array for path, array in network.views.items()}
        specs = {path: (_dtype(array, dtype), array.shape) for path, array in old.items()}
        _, stem = STEMS[network.model.weights_name]
        write_msgpack(dst / name / f"{stem}.msgpack", specs, functools.partial(_read, old, dtype))
        head = {"_class_name": f"Flax{type(network.model).__name__}"} if "_class_name" in network.config else {}
        weights.write_json(dst / name / "config.json", network.config | architectures(network) | head)
    write_rest(source, dst, "Flax")


def _old_flax(path: names.Path) -> names.Path:
    return tuple(names.rename("/".join(path), names.FLAX_OLD).split("/"))


def _write_single_file(source: OpenedCheckpoint, dst: Path, dtype: DTypeLike | None) -> None:
    cast = lambda array: _dtype(array, dtype)
    if not source.class_name:
        network = source.networks[""]
        kind = type(network.model).__name__
        if kind not in layouts.NETWORKS:
            raise WeightsError(f"{kind} has no single-file layout; those that have are {', '.join(layouts.NETWORKS)}")
        config = network.model.config_json()
        layouts.write_network(dst, kind, names.torch_tensors(network.views), config, cast)
        return
    configs = {name: network.config for name, network in source.networks.items()}
    tensors = {name: names.torch_tensors(network.views) for name, network in source.networks.items()}
    schedulers = source.schedulers | {
        name: weights.read_json(entry.folder / SCHEDULER)
        for name, entry in source.folders.items()
        if (entry.folder / SCHEDULER).is_file()
    }
    family = layouts.family_for(configs, schedulers)
    layouts.write_single_file(dst, tensors, family, cast, configs=configs, schedulers=schedulers)


WRITERS = {"diffusers": _write_diffusers, "flax-msgpack": _write_flax, "single-file": _write_single_file}


def _read(tensors: Mapping[Any, np.ndarray], dtype: DTypeLike | None, key: Any) -> np.ndarray:
    """One tensor copied to memory in the dtype of the result; its file pages are released."""
    array = compact(tensors[key], _dtype(tensors[key], dtype))
    forget(tensors[key])
    return array


def write_rest(source: OpenedCheckpoint, dst: Path, prefix: str) -> None:
    """Write a pipeline's tokenizers, schedulers and index."""
    if not source.class_name:
        return
    entries: dict[str, tuple[str | None, str | None]] = dict.fromkeys(source.absent, (None, None))
    for name, network in source.networks.items():
        if name.rpartition("_")[0] not in source.lists:
            entries[name] = (network.library, prefix + type(network.model).__name__)
    entries |= {name: (entry.library, entry.class_name) for name, entry in source.lists.items()}
    for name, entry in source.folders.items():
        flax = prefix if entry.library == "diffusers" else ""
        shutil.copytree(refuse_links(entry.folder, deep=True), dst / name)
        entries[name] = (entry.library, flax + entry.class_name)
        scheduler = dst / name / SCHEDULER
        if scheduler.is_file():
            weights.write_json(scheduler, weights.read_json(scheduler) | {"_class_name": flax + entry.class_name})
    for name, config in source.schedulers.items():
        kind = prefix + config["_class_name"]
        weights.write_json(dst / name / SCHEDULER, config | {"_class_name": kind})
        entries[name] = ("diffusers", kind)
    for name, tokenizer in source.tokenizers.items():
        with naming(dst / name):
            tokenizer.save_pretrained(dst / name)
        entries[name] = ("transformers", "CLIPTokenizer")
    weights.write_index(dst, prefix + source.class_name, entries, source.options)


def _verify(source: OpenedCheckpoint, written: Path, to: str, dtype: DTypeLike | None) -> None:
    """Read the result back and compare every tensor with its source, bit for bit."""
    if to == "single-file" and not source.class_name:
        kind = type(source.networks[""].model).__name__
        again = _networks({"": layouts.read_network(written, kind)}, written)
    elif to == "single-file":
        again = _networks(layouts.read_single_file(written).networks, written)
    else:
        again = {
            name: _open_network("", type(network.model).__name__, written / name, written / name, None)
            for name, network in source.networks.items()
        }
    if again.keys() != source.networks.keys():
        raise WeightsError(f"{written}: holds {', '.join(again)} instead of {', '.join(source.networks)}")
    for name, network in source.networks.items():
        for path in network.views:
            if not same_bits(_read(network.views, dtype, path), _read(again[name].views, None, path)):
                raise WeightsError(f"{written}: {name}/{'/'.join(path)} differs from its source after writing")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal in dtype, shape and every bit (so a NaN equals itself)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    raw = np.dtype(f"u{a.dtype.itemsize}")
    return bool(np.array_equal(a.view(raw), b.view(raw)))
