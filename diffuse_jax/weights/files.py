"""Files: mapping them, reading and writing JSON, and choosing the weight files of a network."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.errors import WeightsError, bad
from diffuse_jax.limits import open_regular, parse_json, read_bounded, refuse_links
from diffuse_jax.weights.copy import Pages
from diffuse_jax.writing import SUFFIX, atomic_file, is_being_written

LFS = b"version https://git-lfs"
"""The beginning of a Git LFS pointer, the small text that stands in for a large file."""


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file as a read-only, memory-mapped uint8 array; nothing is read yet.

    Raises:
      WeightsError: the file is empty, not a regular file, or a Git LFS pointer left by a clone without LFS.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise bad(path, "the file is empty")
        if file.read(len(LFS)) == LFS:
            raise bad(path, "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
        pages = Pages(file.fileno(), 0, access=mmap.ACCESS_READ)
        pages.path = path
        return np.frombuffer(pages, np.uint8)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, in the format of diffusers (indented by two spaces, sorted keys)."""
    with atomic_file(path) as file:
        file.write((json.dumps(data, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most :data:`~diffuse_jax.limits.MAX_JSON` bytes.

    Raises:
      WeightsError: the file is missing, not a regular file, too large or malformed; the message names it.
    """
    try:
        text = read_bounded(path)
    except FileNotFoundError as error:
        raise bad(path, "no such file") from error
    except OSError as error:
        raise bad(path, f"not readable ({error})") from error
    data = parse_json(path, text)
    if not isinstance(data, dict):
        raise bad(path, f"expected a JSON object, got {type(data).__name__}")
    return data


STEMS = {
    "diffusion_pytorch_model": ("diffusion_pytorch_model", "diffusion_flax_model"),
    "model": ("pytorch_model", "flax_model"),
}
"""Stem of the safetensors file -> stems of the ``.bin`` and ``.msgpack`` files that older releases wrote instead."""


def weight_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The files with a network's weights: safetensors if there are any, else ``.bin``, else ``.msgpack``.

    Args:
      folder: the component's folder.
      stem: ``diffusion_pytorch_model``, or ``model`` for transformers' networks.
      variant: with ``"fp16"``, only files such as ``{stem}.fp16.safetensors`` are considered.

    Raises:
      WeightsError: there is no such file; the message lists what the folder contains.
    """
    names = sorted(p.name for p in refuse_links(folder).iterdir()) if folder.is_dir() else []
    chosen = choose_weights(names, stem, variant)
    if chosen is None:
        wanted = ", ".join(candidates(stem, variant))
        have = ", ".join(names) or ("nothing" if folder.is_dir() else "no such folder")
        raise bad(
            folder,
            f"no weights{f' of variant {variant!r}' if variant else ''}: looked for {wanted}; found {have}"
            f"{advice(variants(names, stem) - {variant})}"
            f"{'; weights without a variant are there' if variant and choose_weights(names, stem) else ''}",
        )
    path = folder / chosen
    return shards(path) if chosen.endswith(".json") else [path]


def variants(names: Iterable[str], stem: str) -> set[str]:
    """The variants of a network's weights, such as ``fp16``, among these file names."""
    stems = "|".join(map(re.escape, (stem, *STEMS.get(stem, ()))))
    ends = r"(?P<a>\w+)(-\d+-of-\d+)?\.(safetensors|bin|msgpack)|(safetensors|bin)\.index\.(?P<b>\w+)\.json"
    found = (re.fullmatch(rf"({stems})\.({ends})", name) for name in names)
    return {m["a"] or m["b"] for m in found if m} - {"non_ema"}


def advice(found: set[str]) -> str:
    """The part of an error message that says how to read one of these variants; empty if there is none."""
    return "".join(f"; for variant {v!r}, pass variant={v!r} (--variant {v})" for v in sorted(found))


def candidates(stem: str, variant: str | None = None) -> list[str]:
    """The possible names of a network's weight file or index, in order of preference."""
    torch, flax = STEMS.get(stem, (stem, stem))
    dot = f".{variant}" if variant else ""
    return [
        f"{stem}{dot}.safetensors",
        f"{stem}.safetensors.index{dot}.json",
        f"{torch}{dot}.bin",
        f"{torch}.bin.index{dot}.json",
        f"{flax}{dot}.msgpack",
    ]


def choose_weights(names: list[str], stem: str, variant: str | None = None) -> str | None:
    """The preferred weight file or index among these names, or None."""
    return next((name for name in candidates(stem, variant) if name in names), None)


def shards(index: Path) -> list[Path]:
    """The shards that an index names.

    Raises:
      WeightsError: a shard is not a plain file name, or does not exist.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise bad(index, "has no 'weight_map'")
    for key, name in weight_map.items():
        if not is_plain_name(name):
            raise bad(index, f"{key!r} is listed in {name!r}, which is not a plain file name")
        if not (index.parent / name).is_file():
            raise bad(index, f"{key!r} is listed in {name!r}, which does not exist")
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def is_plain_name(name: Any) -> bool:
    """Whether joining a name to a folder cannot lead out of the folder."""
    return isinstance(name, str) and bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", name))


def require_folder(folder: Path) -> Path:
    """Return the folder after checking it.

    Raises:
      WeightsError: it does not exist, or has links that lead out of it.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder")
    return refuse_links(folder)


@contextmanager
def unchanged(*places: Path) -> Iterator[None]:
    """A context for reading files that belong together, which detects that another process replaces some of them.

    Args:
      places: files, and folders with files.

    Raises:
      WeightsError: a file has changed within the context, or is being written at its start.
    """
    before = _identities(places)
    if partial := next((name for name in before if name.endswith(SUFFIX)), None):
        raise bad(Path(partial).parent, "is being written by another process. Try again")
    try:
        yield
    except (OSError, ValueError) as error:
        _refuse_changes(before, _identities(places), error)
        raise
    _refuse_changes(before, _identities(places), None)


def _refuse_changes(before: dict[str, Any], after: dict[str, Any], cause: Exception | None) -> None:
    if before != after:
        name = min(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        raise bad(name, "changed while it was being read; another process is writing it. Try again") from cause


def _identities(places: Iterable[Path]) -> dict[str, tuple[int, int, int]]:
    """File -> inode, size and modification time, including files being written but no other hidden ones."""
    found = {}
    for place in places:
        for path in place.iterdir() if place.is_dir() else (place,):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                relevant = is_being_written(path) if path.name.startswith(".") else stat.S_ISREG(status.st_mode)
                if relevant:
                    found[str(path)] = status.st_ino, status.st_size, status.st_mtime_ns
    return found
