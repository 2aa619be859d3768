"""Data sets in few large files, read at random places: WebDataset tar files, and ArrayRecord files.

A tar file holds the members of a sample side by side, with one key and several suffixes: ``000.jpg``, ``000.txt``. Its
heads are read once at the start, so that samples can be drawn in any order without unpacking.

A record of an ArrayRecord file is one line of JSON, such as ``{"text": "a caption", "name": "000.jpg"}``, the end of
the line, and the bytes of the picture file.
"""

from __future__ import annotations

import functools
import glob
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffuse_jax.images import SUFFIXES, Skipped, warn_of
from diffuse_jax.training.data.sources import captions_of, file_identity, fingerprint
from diffuse_jax.training.data.transform import Record

PICTURES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
TEXTS = ("txt", "text", "caption")


def expand(patterns: Sequence[str]) -> list[Path]:
    """Files that patterns name: ``*`` and ``?`` as in a shell, and ``{000..012}`` or ``{a,b}``.

    Raises:
      FileNotFoundError: nothing has such a name.
    """
    paths = []
    for pattern in patterns:
        for name in braces(pattern):
            found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
            if not found or not all(Path(path).is_file() for path in found):
                raise FileNotFoundError(f"--train_shards {pattern}: no file {name}")
            paths += [Path(path) for path in found]
    return paths


def braces(pattern: str) -> Iterator[str]:
    """``a{0..2}`` -> a0, a1, a2, with the number of digits that the first number has; ``a{b,c}`` -> ab, ac."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        parts = [f"{n:0{len(numbers[1])}d}" for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        parts = match[1].split(",")
    for part in parts:
        yield from braces(pattern[: match.start()] + part + pattern[match.end() :])


def shard_source(patterns: Sequence[str], caption_column: str | None) -> TarSource | ArrayRecordSource:
    """The source for some files of one kind; their names say which.

    Raises:
      FileNotFoundError: nothing has such a name.
      ValueError: the names are not those of tar files, or of ArrayRecord files.
    """
    paths = expand(patterns)
    if all(path.suffix == ".tar" for path in paths):
        return TarSource(paths, caption_column)
    if all(re.search(r"\.array_?record", path.name) for path in paths):
        return ArrayRecordSource(paths, caption_column)
    names = ", ".join(path.name for path in paths[:3])
    raise ValueError(f"--train_shards must name .tar files (not compressed) or .array_record files, got {names}")


class Place(NamedTuple):
    """Where a member's bytes are in its file."""

    offset: int
    size: int


class TarSource:
    """Samples of WebDataset tar files: a picture each, and its caption in a text file or in a JSON file's column."""

    def __init__(self, paths: Sequence[str | Path], caption_column: str | None = "text") -> None:
        """Read the heads of all members. Samples without a picture are left out, with a warning.

        Raises:
          ValueError: a sample has no caption where one is wanted, a file is no tar file or a damaged one, or there are
            no pictures.
        """
        self._paths, self._column = [Path(path) for path in paths], caption_column
        rows, keys, left_out = [], [], []
        for number, path in enumerate(self._paths):
            for key, members in _samples(path):
                picture = _first(members, PICTURES)
                if picture is None:
                    left_out.append(f"{key} in {path}")
                    continue
                text, line = _first(members, TEXTS), members.get("json")
                if caption_column is not None and text is None and line is None:
                    raise ValueError(f"{path}: {key} has no caption: no .{', .'.join(TEXTS)} and no .json")
                caption = text or line or Place(0, 0)
                rows.append((number, *picture, *caption, text is not None))
                keys.append(key.encode())
        if not rows:
            raise ValueError(f"no pictures (.{', .'.join(PICTURES)}) in {self._paths[0]} and the other shards")
        warn_of(Skipped(len(left_out), left_out[0] if left_out else ""), f"{self._paths[0]} and the other shards")
        self._rows, self._keys = np.array(rows, np.int64), np.array(keys)
        self.fingerprint = fingerprint(f"tar {caption_column}", map(file_identity, self._paths))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        number, picture, size, caption, length, plain = self._rows[index].tolist()
        path = self._paths[number]
        name = f"{self._keys[index].decode()} in {path}"
        with path.open("rb") as file:
            image = _bytes(file, Place(picture, size), name)
            if self._column is None:
                return Record(image, ("",), name)
            text = _bytes(file, Place(caption, length), name)
        row = {self._column: _decoded(text, name).strip()} if plain else _object(_decoded(text, name), name)
        return Record(image, captions_of(row, self._column, name), name)


def _samples(path: Path) -> Iterator[tuple[str, dict[str, Place]]]:
    """Key and members of each sample; the key is the name up to the first dot after the folders.

    Raises:
      ValueError: no tar file, or one that is damaged, cut off or holds a member twice: samples would be lost.
    """
    samples: dict[str, dict[str, Place]] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    raise ValueError(f"{path} is cut off in {member.name!r}, after {len(samples)} samples")
                folder, _, name = member.name.rpartition("/")
                if member.isdir() or name.startswith("."):
                    continue
                if not member.isfile() or member.issparse():
                    raise ValueError(f"{path}: {member.name!r} is a link or the like, without bytes of its own")
                stem, _, suffix = name.partition(".")
                sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                if suffix.lower() in sample:
                    raise ValueError(f"{path} has {member.name!r} twice (or in upper and lower case)")
                sample[suffix.lower()] = Place(member.offset_data, member.size)
            _check_end(path, tar.offset, len(samples))
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not an uncompressed tar file, or is damaged: {error}") from error
    yield from samples.items()


def _check_end(path: Path, offset: int, count: int) -> None:
    """Refuse an archive with more than its end where reading it stopped: after a damaged head Python's ``tarfile``
    stops, without an error, as at the end."""
    zeros, left = bytes(tarfile.RECORDSIZE), path.stat().st_size - offset
    with path.open("rb") as file:
        file.seek(offset)
        blocks = iter(functools.partial(file.read, len(zeros)), b"")
        if any(block != zeros[: len(block)] for block in blocks):
            raise ValueError(
                f"{path} is damaged, or several archives in one file: what follows {count} samples, at byte {offset}, "
                "is neither a member nor the end; the samples behind it would be lost"
            )
    if left < tarfile.BLOCKSIZE:
        raise ValueError(f"{path} is cut off after {count} samples: it has no end of archive")


def _first(members: dict[str, Place], suffixes: Sequence[str]) -> Place | None:
    return next((members[suffix] for suffix in suffixes if suffix in members), None)


def _bytes(file: Any, place: Place, name: str) -> bytes:
    file.seek(place.offset)
    content = file.read(place.size)
    if len(content) != place.size:
        raise ValueError(f"{name}: the file ends in the middle of it")
    return content


def _decoded(text: bytes, name: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: the caption is not UTF-8: {error}") from error


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: its .json cannot be read: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{name}: its .json must hold names and values, got {text[:100]}")
    return row


class ArrayRecordSource:
    """Records of ArrayRecord files, read through grain."""

    def __init__(self, paths: Sequence[str | Path], caption_column: str | None = "text") -> None:
        import grain

        self._records = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
        self._column, self._name = caption_column, str(paths[0])
        self.fingerprint = fingerprint(f"array_record {caption_column}", (file_identity(Path(path)) for path in paths))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        head, found, image = self._records[int(index)].partition(b"\n")
        where = f"record {index} of {self._name}"
        try:
            line = json.loads(head)
        except ValueError:
            line = None
        if not found or not isinstance(line, dict):
            raise ValueError(f"{where} is not a line of JSON followed by a picture")
        return Record(image, captions_of(line, self._column, where), str(line.get("name", where)))


def write_tar(path: str | Path, rows: Iterable[tuple[str, bytes, str | Sequence[str]]]) -> None:
    """Write a shard of ``(name of the picture, its bytes, caption or captions)``; a list goes to JSON, ``text``."""
    with tarfile.open(path, "w") as tar:
        for name, image, caption in rows:
            stem = name.rpartition(".")[0]
            text = (
                (f"{stem}.txt", caption)
                if isinstance(caption, str)
                else (f"{stem}.json", json.dumps({"text": caption}))
            )
            for member, content in ((name, image), (text[0], text[1].encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_array_record(path: str | Path, rows: Iterable[tuple[str, bytes, str | Sequence[str]]]) -> None:
    """Write an ArrayRecord file of ``(name of the picture, its bytes, caption or captions)``."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for name, image, caption in rows:
        writer.write(json.dumps({"name": name, "text": caption}).encode() + b"\n" + image)
    writer.close()
