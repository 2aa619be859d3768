"""Checksums of the files of a checkpoint, to refuse one that was damaged, or replaced while it was being read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffuse_jax.errors import bad
from diffuse_jax.limits import open_regular, parse_json, read_bounded, refuse_links
from diffuse_jax.writing import naming

FILE = "checksums.json"

_WHOLE: set[tuple[Path, tuple[int, ...] | None, str]] = set()
"""Path, version and digest of the files that were found whole, so that checking them again reads nothing."""


def write_checksums(folder: Path, files: list[Path]) -> None:
    """Write the SHA-256 digests of ``files`` to a file in ``folder``."""
    sums = {str(path.relative_to(folder)): _digest(path) for path in sorted(files)}
    with naming(folder / FILE):
        (folder / FILE).write_text(json.dumps(sums, indent=1), encoding="utf-8")


def verify(folder: Path) -> None:
    """Compare a folder's files with their checksums, if it has any; the processes of a run share the work.

    A file that has not been written since this process last found it whole is not read again.

    Raises:
      ValueError: a file is missing or has changed, or a link leaves the folder. Raised on all processes.
    """
    refuse_links(folder, deep=True)
    if not (folder / FILE).is_file():  # checkpoints of older versions have no checksums
        return
    sums = parse_json(folder / FILE, read_bounded(folder / FILE))
    if not isinstance(sums, dict) or not all(isinstance(digest, str) for digest in sums.values()):
        raise bad(folder / FILE, "damaged: expected file names and checksums")
    names = sorted(sums)
    share = range(jax.process_index(), len(names), jax.process_count())
    wrong = np.array([min((i for i in share if not _is_whole(folder, names[i], sums[names[i]])), default=-1)])
    if jax.process_count() > 1:
        wrong = np.asarray(multihost_utils.process_allgather(wrong)).reshape(-1)
    if (found := wrong[wrong >= 0]).size:
        raise bad(folder / names[found[0]], "damaged: missing, or not what was written")


def _is_whole(folder: Path, name: str, digest: str) -> bool:
    known = (folder / name, _version(folder / name), digest)
    if known in _WHOLE:
        return True
    try:
        whole = _digest(folder / name) == digest
    except (OSError, ValueError):  # missing, or not a regular file
        return False
    if whole:
        _WHOLE.add(known)
    return whole


def _digest(path: Path) -> str:
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is written again; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@contextmanager
def not_replaced(folder: Path) -> Iterator[None]:
    """Check that a folder is not replaced by another of the same name while the block reads it.

    Raises:
      ValueError: it was replaced.
    """
    before = _identity(folder)
    yield
    if _identity(folder) != before:
        raise bad(folder, "was replaced by another process while it was being read; try again")


def _identity(folder: Path) -> tuple[int, int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns
