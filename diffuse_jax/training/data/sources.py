"""Where pictures and captions come from: the protocol, image folders, and a part of another source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffuse_jax.training.data.transform import PICTURE_SUFFIXES, SUBSET, Record, is_picture

METADATA = "metadata.jsonl"


class Source(Protocol):
    """Rows that can be read in any order; it is sent to worker processes, so it must pickle and hold little.

    Attributes:
      fingerprint: changes when the content does; part of the key of everything that is computed from the rows.
    """

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class FolderSource:
    """An image folder: ``metadata.jsonl`` with ``file_name`` and a caption (or list of captions) per line.

    ``metadata.jsonl`` may lie in the folder or in folders below it; ``file_name`` is relative to it. Only the place of
    each line is kept in memory. Where captions are not wanted, a folder without it is read too: all pictures in the
    folder and below, by name.
    """

    def __init__(self, folder: str | Path, caption_column: str | None = "text") -> None:
        """Find the pictures and check every line.

        Args:
          folder: where to look.
          caption_column: key of the caption; None where captions are not needed.

        Raises:
          FileNotFoundError: no ``metadata.jsonl``, or a picture that it names is missing, or there are no pictures.
          ValueError: a line that is no JSON object with ``file_name`` and the column, a caption that is not text, or
            no lines at all.
        """
        self.folder, self.caption_column = Path(folder), caption_column
        here = self.folder / METADATA
        self._metadata = [here] if here.is_file() else sorted(self.folder.rglob(METADATA))
        if not self._metadata:
            self._pictures = _bare_pictures(self.folder, caption_column)
            self.fingerprint = fingerprint("files", map(file_identity, self._pictures))
            return
        places, digest = [], []
        for number, path in enumerate(self._metadata):
            for offset, text, where in _lines(path):
                places.append((number, offset))
                picture, captions = _parse(text, path, caption_column, where)
                if not picture.is_file():
                    raise FileNotFoundError(f"{where}: {picture} does not exist")
                digest.append(f"{file_identity(picture)} {captions}")
        if not places:
            raise ValueError(f"{self._metadata[0]} is empty")
        self._places = np.array(places, np.int64)
        self.fingerprint = fingerprint("lines", digest)

    def __len__(self) -> int:
        return len(self._places) if self._metadata else len(self._pictures)

    def __getitem__(self, index: int) -> Record:
        if not self._metadata:
            path = self._pictures[index]
            return Record(str(path), ("",), str(path))
        number, offset = self._places[index]
        path = self._metadata[number]
        with path.open("rb") as file:
            file.seek(offset)
            picture, captions = _parse(file.readline(), path, self.caption_column, str(path))
        return Record(str(picture), captions, str(picture))


def _bare_pictures(folder: Path, caption_column: str | None) -> list[Path]:
    if caption_column is not None:
        raise FileNotFoundError(
            f"{folder / METADATA} does not exist; --train_data_dir needs one line per picture there: "
            f'{{"file_name": "a.png", "{caption_column}": "a caption"}}'
        )
    files = sorted(file for file in folder.rglob("*") if is_picture(file))
    if not files:
        raise FileNotFoundError(f"no pictures ({', '.join(PICTURE_SUFFIXES)}) in {folder}")
    return files


def _lines(path: Path) -> Iterator[tuple[int, bytes, str]]:
    """Offset, text and description of every line that is not blank."""
    offset = 0
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                yield offset, text, f"{path}:{number}"
            offset += len(text)


def _parse(text: bytes, path: Path, caption_column: str | None, where: str) -> tuple[Path, tuple[str, ...]]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not a line of JSON: {error}") from error
    if not isinstance(line, dict) or not isinstance(line.get("file_name"), str):
        raise ValueError(f'{where}: needs a "file_name", got {text.decode(errors="replace").strip()[:100]}')
    return path.parent / line["file_name"], captions_of(line, caption_column, where)


def captions_of(row: dict[str, Any], column: str | None, where: str) -> tuple[str, ...]:
    """The captions of a row: a text or a list of texts under ``column``; ("",) if ``column`` is None.

    Raises:
      ValueError: there is no such column, or it holds something else.
    """
    if column is None:
        return ("",)
    if column not in row:
        raise ValueError(f"{where}: no column {column!r} (--caption_column); it has {sorted(row)}")
    value = row[column]
    texts = tuple(value) if isinstance(value, list | tuple | np.ndarray) else (value,)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: {column!r} must be a text or a list of texts, got {value!r}")
    return texts


class Part:
    """Some rows of a source, such as the first of a shuffle."""

    def __init__(self, source: Source, rows: Sequence[int] | np.ndarray) -> None:
        self._source, self._rows = source, np.asarray(rows, np.int64)
        self.fingerprint = fingerprint("part", [source.fingerprint, *map(str, self._rows.tolist())])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._rows[index])]


def sample(source: Source, count: int, seed: int) -> Source:
    """At most ``count`` rows: the first of a shuffle by ``seed``.

    Raises:
      ValueError: ``count`` is not positive.
    """
    if count < 1:
        raise ValueError(f"--max_train_samples must be at least 1, got {count}")
    if count >= len(source):
        return source
    return Part(source, np.random.default_rng([seed, SUBSET]).permutation(len(source))[:count])


def fingerprint(kind: str, parts: Iterable[str]) -> str:
    """A name for some texts, in their order."""
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        digest.update(b"\0" + part.encode())
    return digest.hexdigest()[:32]


def file_identity(path: Path) -> str:
    """What changes when a file does: its name, size and time of change."""
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"
