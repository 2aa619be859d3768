"""Files: mapping them, reading and writing JSON, choosing those that hold a network."""

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
"""How the small text begins that Git keeps in the place of a large file."""


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file as a read-only uint8 array backed by the file itself; nothing is read yet.

    Raises:
      WeightsError: the file is empty or not a regular file, or a clone without Git LFS left a pointer in its place.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise bad(path, "the file is empty")
        if file.read(len(LFS)) == LFS:
            raise bad(path, "is a pointer of Git LFS and not the file itself; fetch that with `git lfs pull`")
        pages = Pages(file.fileno(), 0, access=mmap.ACCESS_READ)
        pages.path = path
        return np.frombuffer(pages, np.uint8)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, in the form diffusers uses (two spaces, sorted keys)."""
    with atomic_file(path) as file:
        file.write((json.dumps(data, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most :data:`~diffuse_jax.limits.MAX_JSON` bytes.

    Raises:
      WeightsError: the file is missing, not a regular file, too large or malformed; the text names it.
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
    """The files that together hold a network's weights; safetensors are preferred, then ``.bin``, then ``.msgpack``.

    Args:
      folder: the component's folder.
      stem: ``diffusion_pytorch_model``, or ``model`` for transformers' networks.
      variant: ``"fp16"`` chooses ``{stem}.fp16.safetensors`` and nothing else.

    Raises:
      WeightsError: there is no such file; the text lists what the folder has.
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
            f"{'; those without a variant are there' if variant and choose_weights(names, stem) else ''}",
        )
    path = folder / chosen
    return shards(path) if chosen.endswith(".json") else [path]


def variants(names: Iterable[str], stem: str) -> set[str]:
    """The variants of a network's weights among some files, such as ``fp16``."""
    stems = "|".join(map(re.escape, (stem, *STEMS.get(stem, ()))))
    ends = r"(?P<a>\w+)(-\d+-of-\d+)?\.(safetensors|bin|msgpack)|(safetensors|bin)\.index\.(?P<b>\w+)\.json"
    found = (re.fullmatch(rf"({stems})\.({ends})", name) for name in names)
    return {m["a"] or m["b"] for m in found if m} - {"non_ema"}


def advice(found: set[str]) -> str:
    """What to write to read one of these variants; nothing if there is none."""
    return "".join(f"; for those of variant {v!r} give variant={v!r} (--variant {v})" for v in sorted(found))


def candidates(stem: str, variant: str | None = None) -> list[str]:
    """The file names that may hold (or index) a network's weights, best first."""
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
    """The best of the files named, or None."""
    return next((name for name in candidates(stem, variant) if name in names), None)


def shards(index: Path) -> list[Path]:
    """The files an index names; each must be a plain name beside the index and must exist."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise bad(index, "has no 'weight_map'")
    for key, name in weight_map.items():
        if not is_plain_name(name):
            raise bad(index, f"{key!r} is said to lie in {name!r}, which is not a plain file name")
        if not (index.parent / name).is_file():
            raise bad(index, f"{key!r} is said to lie in {name!r}, which does not exist")
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def is_plain_name(name: Any) -> bool:
    """Whether a name from a file may be joined to a folder without leaving it."""
    return isinstance(name, str) and bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", name))


def require_folder(folder: Path) -> Path:
    """The folder itself, or an error that says it is missing, or has links that leave it."""
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder")
    return refuse_links(folder)


@contextmanager
def unchanged(*places: Path) -> Iterator[None]:
    """While files are read that belong together: another process must not replace some of them.

    Args:
      places: files, and folders whose files count.

    Raises:
      WeightsError: one of them has changed, or is being written already.
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
        raise bad(name, "has changed while it was being read; another process writes it. Try again") from cause


def _identities(places: Iterable[Path]) -> dict[str, tuple[int, int, int]]:
    """File -> what changes when it does; with those that are being written, and other hidden ones left out."""
    found = {}
    for place in places:
        for path in place.iterdir() if place.is_dir() else (place,):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                counts = is_being_written(path) if path.name.startswith(".") else stat.S_ISREG(status.st_mode)
                if counts:
                    found[str(path)] = status.st_ino, status.st_size, status.st_mtime_ns
    return found
