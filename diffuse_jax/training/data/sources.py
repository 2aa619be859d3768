"""Sources of images and captions: the protocol, image folders, and subsets of other sources."""

from __future__ import annotations

import bisect
import csv
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffuse_jax.images import SUFFIXES, find_images, warn_of
from diffuse_jax.limits import SURROGATE, open_regular, parse_json, refuse_links
from diffuse_jax.messages import warn
from diffuse_jax.training.data.transform import SUBSET, Record

OTHER_IMAGES = {
    "conditioning": ("--conditioning_image_column", "control image", "edges/a.png"),
    "mask": ("--mask_column", "mask", "masks/a.png"),
}
"""Field of :class:`Record` -> the flag that names its column, what it is, and an example."""

METADATA = ("metadata.jsonl", "metadata.csv")


class Source(Protocol):
    """Rows with random access. A source is sent to worker processes, so it must be picklable and small.

    Attributes:
      fingerprint: changes with the content; part of the key of everything that is computed from the rows.
    """

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def other_columns(conditioning_column: str | None, mask_column: str | None) -> dict[str, str]:
    """Field of :class:`Record` -> the column of these images, of those that are needed."""
    columns = {"conditioning": conditioning_column, "mask": mask_column}
    return {field: column for field, column in columns.items() if column is not None}


class FolderSource:
    """An image folder: ``metadata.jsonl`` with ``file_name`` and a caption (or list of captions) per line.

    ``metadata.csv`` with these columns works as well. Either may be in the folder or in subfolders; ``file_name`` is
    relative to it. Only the offset of each line is kept in memory. If captions are not needed, a folder without
    metadata can be read too: all images in it and its subfolders, sorted by name. Hidden files and folders are skipped.
    """

    def __init__(
        self,
        folder: str | Path,
        caption_column: str | None = "text",
        conditioning_column: str | None = None,
        mask_column: str | None = None,
        *,
        metadata: bool = True,
    ) -> None:
        """Find the images and check every line; warns about images and other files that are left out.

        Args:
          folder: the image folder.
          caption_column: key of the caption; None if captions are not needed.
          conditioning_column: key of the path of the control image, or the same with ``_file_name`` as in Hugging
            Face's image folders; None if control images are not needed.
          mask_column: the same for masks.
          metadata: False reads all images, whether a metadata file names them or not.

        Raises:
          FileNotFoundError: the folder, the ``metadata.jsonl`` or an image that it names does not exist, or there are
            no images.
          ValueError: a line lacks one of these keys, an image is outside the folder, a link leaves it, a
            caption is not a string, or there are no lines.
        """
        self.folder, self.caption_column = Path(folder), caption_column
        self._columns = other_columns(conditioning_column, mask_column)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder")
        refuse_links(self.folder, deep=True)
        self._metadata = _metadata_files(self.folder) if metadata else []
        if not self._metadata:
            self._images = _uncaptioned_images(self.folder, caption_column, self._columns)
            self.fingerprint = fingerprint("files", map(file_identity, self._images))
            return
        places, digest = [], []
        named: set[str] = set()
        for number, path in enumerate(self._metadata):
            for offset, line, where in _lines(path):
                places.append((number, offset))
                image, captions, others = self._parse(line, path, where)
                files = [image, *others.values()]
                for file in files:
                    if not os.path.isfile(file):  # unlike is_file, also for names that no file can have
                        raise FileNotFoundError(f"{where}: {file} does not exist")
                digest.append(f"{' '.join(map(file_identity, files))} {captions}")
                named.update(map(str, files))
        if not places:
            raise ValueError(f"{self._metadata[0]} is empty")
        _warn_of_unnamed(self.folder, named)
        self._places = np.array(places, np.int64)
        self.fingerprint = fingerprint("lines", digest)

    def __len__(self) -> int:
        return len(self._places) if self._metadata else len(self._images)

    def __getitem__(self, index: int) -> Record:
        if not self._metadata:
            path = self._images[index]
            return Record(str(path), ("",), str(path))
        number, offset = self._places[index]
        path = self._metadata[number]
        _, line, where = next(_lines(path, int(offset)))
        image, captions, others = self._parse(line, path, where)
        return Record(str(image), captions, str(image), **{field: str(file) for field, file in others.items()})

    def _parse(self, line: dict[str, Any], path: Path, where: str) -> tuple[Path, tuple[str, ...], dict[str, Path]]:
        image, others = self._file(line, "file_name", path, where), {}
        for field, column in self._columns.items():
            key = column if column in line else f"{column}_file_name"
            if key not in line:
                flag, what, _ = OTHER_IMAGES[field]
                raise ValueError(f"{where}: no {what} under {column!r} ({flag}); it has {sorted(line)}")
            others[field] = self._file(line, key, path, where)
        return image, captions_of(line, self.caption_column, where), others

    def _file(self, line: dict[str, Any], key: str, path: Path, where: str) -> Path:
        """The file that a line names under a key, relative to its metadata file ``path``."""
        name = line.get(key)
        if not isinstance(name, str) or not name:
            raise ValueError(f'{where}: needs a "{key}", got {str(line)[:100]}')
        file = Path(os.path.normpath(path.parent / name))  # not resolved: ".." after a link would lead elsewhere
        if not file.is_relative_to(os.path.normpath(self.folder)):
            raise ValueError(f"{where}: {key} {name!r} leaves the folder {self.folder}; keep images inside it")
        return file


def _metadata_files(folder: Path) -> list[Path]:
    """The metadata file of the folder or, if it has none, those of its subfolders; hidden folders are skipped.

    Raises:
      ValueError: a folder has both kinds.
    """
    found = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        have = [Path(parent, name) for name in METADATA if name in files]
        if len(have) > 1:
            raise ValueError(f"{parent} has both {' and '.join(METADATA)}; keep one")
        if have:
            found[Path(parent)] = have[0]
        if folder in found:
            break
    return sorted(found.values())


def _uncaptioned_images(folder: Path, caption_column: str | None, columns: Mapping[str, str]) -> list[Path]:
    wanted = {caption_column: "a caption"} | {column: OTHER_IMAGES[field][2] for field, column in columns.items()}
    if keys := {key: value for key, value in wanted.items() if key is not None}:
        raise FileNotFoundError(
            f"{folder / METADATA[0]} does not exist; --train_data_dir needs one line per image there: "
            f"{json.dumps({'file_name': 'a.png', **keys})}"
        )
    files, skipped = find_images(folder)
    if not files:
        others = f"; {skipped.count} other files, for example {skipped.first}" if skipped.count else ""
        raise FileNotFoundError(f"no images ({', '.join(SUFFIXES)}) in {folder}{others}")
    warn_of(skipped, str(folder))
    return files


def _warn_of_unnamed(folder: Path, named: set[str]) -> None:
    """Warn about images that no line of the metadata names. They are recognised by their suffix, and not
    opened."""
    left, first = 0, ""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = os.path.normpath(os.path.join(parent, name))
            if not name.startswith(".") and name.lower().endswith(SUFFIXES) and path not in named:
                left, first = left + 1, first or path
    if left:
        warn(f"{folder}: {left} images are left out because no metadata names them, for example {first}")


def _lines(path: Path, start: int | None = None) -> Iterator[tuple[int, dict[str, Any], str]]:
    """The offset, content and description of every line that is not blank, from the offset ``start`` on."""
    return (_csv_lines if path.suffix == ".csv" else _json_lines)(path, start)


def _json_lines(path: Path, start: int | None) -> Iterator[tuple[int, dict[str, Any], str]]:
    with os.fdopen(open_regular(path), "rb") as file:
        offset = file.seek(start or 0)
        for number, text in enumerate(file, 1):
            where = f"{path}:{number}" if start is None else str(path)
            if text.strip():
                yield offset, _json_object(text, where), where
            offset += len(text)


def _json_object(text: bytes, where: str) -> dict[str, Any]:
    line = parse_json(where, text, what="the line", unique=True)
    if not isinstance(line, dict):
        raise ValueError(f'{where}: needs a "file_name", got {text.decode(errors="replace").strip()[:100]}')
    return line


def _csv_lines(path: Path, start: int | None) -> Iterator[tuple[int, dict[str, Any], str]]:
    """:func:`_lines` of a CSV file, whose first line names the columns; a caption may have several lines."""
    with os.fdopen(open_regular(path), "rb") as file:
        # The reader requests one line at a time, so after each row the file is at the beginning of the next one.
        reader = csv.reader((line.decode("utf-8-sig") for line in iter(file.readline, b"")), strict=True)
        try:
            columns = next(reader, [])
            twice = next((name for name in columns if name and columns.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{path}: several columns have the name {twice!r}")
            if start is not None:
                file.seek(start)
            offset = file.tell()
            for values in reader:
                where = f"{path}:{reader.line_num}" if start is None else str(path)
                if values and len(values) != len(columns):
                    raise ValueError(f"{where}: {len(values)} values for the columns {', '.join(columns)}")
                if values:
                    yield offset, dict(zip(columns, values, strict=True)), where
                offset = file.tell()
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{reader.line_num}: not comma-separated values in UTF-8: {error}") from error


def captions_of(row: dict[str, Any], column: str | None, where: str) -> tuple[str, ...]:
    """The captions of a row: a string or a list of strings in ``column``; ("",) if ``column`` is None.

    Raises:
      ValueError: the column does not exist, or contains something else.
    """
    if column is None:
        return ("",)
    if column not in row:
        raise ValueError(f"{where}: no column {column!r} (--caption_column); it has {sorted(row)}")
    value = row[column]
    texts = tuple(value) if isinstance(value, list | tuple | np.ndarray) else (value,)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: {column!r} must be a text or a list of texts, got {value!r}")
    if any(map(SURROGATE.search, texts)):
        raise ValueError(f"{where}: {column!r} is not valid Unicode (half of a surrogate pair), got {value!r}")
    return texts


class Joined:
    """The rows of several sources, one after the other.

    Attributes:
      lengths: the number of rows of each.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources, self.lengths = tuple(sources), tuple(map(len, sources))
        self._ends = list(itertools.accumulate(self.lengths))
        self.fingerprint = fingerprint("joined", [source.fingerprint for source in sources])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        which = bisect.bisect_right(self._ends, index)
        return self._sources[which][index - self._ends[which] + self.lengths[which]]


class Part:
    """A subset of the rows of a source."""

    def __init__(self, source: Source, rows: Sequence[int] | np.ndarray) -> None:
        self._source, self._rows = source, np.asarray(rows, np.int64)
        self.fingerprint = fingerprint("part", [source.fingerprint, *map(str, self._rows.tolist())])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._rows[index])]


def sample(source: Source, count: int, seed: int) -> Source:
    """A random subset of at most ``count`` rows, determined by ``seed``.

    Raises:
      ValueError: ``count`` is not positive.
    """
    if count < 1:
        raise ValueError(f"--max_train_samples must be at least 1, got {count}")
    if count >= len(source):
        return source
    return Part(source, np.random.default_rng([seed, SUBSET]).permutation(len(source))[:count])


def fingerprint(kind: str, parts: Iterable[str]) -> str:
    """A hash of some texts in their order."""
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        digest.update(b"\0" + part.encode(errors="surrogateescape"))  # file names need not be UTF-8
    return digest.hexdigest()[:32]


def file_identity(path: Path) -> str:
    """A text that changes when the file does: its name, size and modification time."""
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"
