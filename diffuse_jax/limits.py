"""Limits on what an unchecked file may claim: sizes of texts, shapes, lengths of names and numbers of items.

The limits are far above what published checkpoints need (thousands of tensors), and low enough that a file that
exceeds them is refused within seconds.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffuse_jax.errors import WeightsError, bad
from diffuse_jax.messages import brief

MAX_JSON = 1 << 24
"""Maximum size of a JSON file in bytes: a configuration, or the index of a sharded checkpoint."""

MAX_VALUES = 2_000_000
"""Maximum number of values in a JSON text, including nested ones."""

MAX_DEPTH = 64
"""Maximum nesting depth of objects and arrays."""

MAX_RANK = 64
"""Maximum number of axes of a tensor; NumPy's limit."""

MAX_ELEMENTS = 1 << 48
"""Maximum number of elements of a tensor, counting axes of length 0 as 1."""

PACKAGE = Path(__file__).parent
"""This package, including the models it ships with; some installers make its files links."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which JSON and Python can express but no tokenizer reads."""

MAX_NAME = 1000
"""Maximum length of a tensor's name in characters."""


def open_regular(path: Path) -> int:
    """A descriptor of a regular file; anything else (a device, a pipe, a folder) is refused without blocking.

    Raises:
      WeightsError: the path is not a regular file.
      OSError: the file is missing or cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise bad(path, "is not a regular file (a folder, a device or a pipe?)")
    return handle


def absence(path: Path) -> str:
    """Why a path is not a file that can be opened, for error messages that begin with the path."""
    if os.path.exists(path):
        return "is not a regular file (a folder, a device or a pipe?)"
    return "is a link that leads to no file" if os.path.islink(path) else "no such file"


def read_bounded(path: Path, limit: int = MAX_JSON) -> bytes:
    """Read a regular file of at most ``limit`` bytes.

    Raises:
      WeightsError: the file is not a regular file, or is larger.
      OSError: the file is missing or cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise bad(path, f"has more than {limit} bytes, the maximum for a file of this kind")
    return data


def parse_json(path: Path | str, text: bytes | str, *, what: str = "it", unique: bool = False) -> Any:
    """Parse a JSON text.

    Args:
      path: the file, or the place in it, that errors name.
      text: a string, or UTF-8 bytes.
      what: what errors call the text, for example ``"header"``.
      unique: refuse an object with duplicate keys.

    Raises:
      WeightsError: the text is not UTF-8 or not JSON, has too many or too deeply nested values, or an integer of
        thousands of digits.
    """
    marks: Sequence[Any] = (b",", b"[", b"{") if isinstance(text, bytes) else (",", "[", "{")
    if sum(text.count(mark) for mark in marks) > MAX_VALUES:
        raise bad(path, f"{what} has more than {MAX_VALUES} values")
    hook = functools.partial(_unique, path, what) if unique else None
    try:
        data = json.loads(text, object_pairs_hook=hook)
    except WeightsError:
        raise
    except RecursionError as error:
        raise bad(path, f"{what} is nested more than {MAX_DEPTH} levels deep") from error
    except ValueError as error:  # not UTF-8, not JSON, or an integer with more digits than Python converts
        if problem := _long_integer(text):
            raise bad(path, f"{what} cannot be read: {problem}") from error
        raise bad(path, f"{what} is not JSON ({error})") from error
    _check_depth(path, data, what)
    return data


def _long_integer(text: bytes | str) -> str:
    """What is wrong with the first integer that Python refuses to convert, and the key before it; empty without one."""
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    if not (limit := sys.get_int_max_str_digits()) or not (found := re.search(rf"\d{{{limit + 1},}}", text)):
        return ""
    keys = re.findall(r'"([^"\\]{1,100})"\s*:', text[max(0, found.start() - 1000) : found.start()])
    digits = f"an integer of {len(found[0])} digits"
    return f"{keys[-1]} has {digits}" if keys else digits


def _unique(path: Path | str, what: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise bad(path, f"{what} names {brief(twice)} twice")
    return found


def _check_depth(path: Path | str, data: Any, what: str) -> None:
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH + 1):
        level = [child for value in level for child in _children(value) if isinstance(child, dict | list)]
        if not level:
            return
    raise bad(path, f"{what} is nested more than {MAX_DEPTH} levels deep")


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def count_elements(path: Path, what: str, shape: Sequence[Any]) -> int:
    """The number of elements of a shape that a file claims for a tensor; errors call the tensor ``what``.

    Raises:
      WeightsError: a size is not a non-negative integer, there are too many axes, or the product is too large.
    """
    if len(shape) > MAX_RANK:
        raise bad(path, f"{what} has {len(shape)} axes; a tensor has at most {MAX_RANK}")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise bad(path, f"{what} has shape {brief(list(shape))}; sizes must be non-negative integers")
    count = 1
    for n in shape:
        count *= n or 1
        if count > MAX_ELEMENTS:
            raise bad(path, f"{what} has shape {brief(list(shape))}, which is too large (over {MAX_ELEMENTS} elements)")
    return 0 if 0 in shape else count


def check_name(path: Path, name: str) -> str:
    """The name of a tensor; an error if it is longer than any real network has."""
    if len(name) > MAX_NAME:
        raise bad(path, f"the name {brief(name)} has {len(name)} characters; the maximum is {MAX_NAME}")
    return name


def refuse_links(folder: Path, *, deep: bool = False) -> Path:
    """Return the folder, or raise if it or something in it is a link that leads out of it.

    A downloaded folder must not make us open other files of this machine. A component may link to other components of
    its pipeline, and a snapshot in the Hub cache to the files of its repository.

    Args:
      folder: the folder about to be read; if ``model_index.json`` is beside it, links may lead anywhere in the folder
        that holds both.
      deep: check its subfolders too.

    Raises:
      WeightsError: there is such a link; names it and its target.
    """
    root = folder.parent if (folder.parent / "model_index.json").is_file() else folder
    if folder.is_relative_to(PACKAGE):
        return folder
    real = _real(root)
    if root != folder:
        _refuse_outside(folder, root, real)
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            if os.path.islink(path):
                _refuse_outside(path, root, real)
        if not deep:
            break
    return folder


def _refuse_outside(path: Path | str, root: Path, real: Path) -> None:
    target = _real(path)
    if not any(target.is_relative_to(place) for place in (real, *_hub_files(real))):
        raise bad(path, f"is a link that leaves {root} (to {target}); replace it with the file itself")


def _hub_files(real: Path) -> list[Path]:
    """Where the Hub cache keeps the files of the snapshot that a folder is, or belongs to."""
    places = (real, *real.parents)
    return [
        repository / "blobs"
        for snapshots, repository in itertools.pairwise(places)
        if snapshots.name == "snapshots" and re.match(r"(models|datasets|spaces)--", repository.name)
    ]


def _real(path: Path | str) -> Path:
    return Path(os.path.realpath(path))
