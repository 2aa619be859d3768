"""Data sets in a few large files with random access: WebDataset tar files and ArrayRecord files.

A tar file contains the members of a sample next to each other, with the same key and different suffixes: ``000.jpg``,
``000.txt``, and for control images ``000.conditioning_image.png``. All member headers are read once at the start, so
that samples can be read in any order without unpacking.

A record of an ArrayRecord file is one line of JSON, such as ``{"text": "a caption", "name": "000.jpg"}``, the end of
the line, and the bytes of the image file.
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
from diffuse_jax.limits import parse_json
from diffuse_jax.training.data.sources import OTHER_IMAGES, captions_of, file_identity, fingerprint, other_columns
from diffuse_jax.training.data.transform import Record

IMAGES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
TEXTS = ("txt", "text", "caption")


def expand(patterns: Sequence[str]) -> list[Path]:
    """The files that match patterns with ``*`` and ``?`` as in a shell, ``{000..012}`` and ``{a,b}``.

    Raises:
      FileNotFoundError: no file matches a pattern.
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
    """Expand braces: ``a{0..2}`` -> a0, a1, a2, with as many digits as the first number; ``a{b,c}`` -> ab, ac."""
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


def shard_source(
    patterns: Sequence[str],
    caption_column: str | None,
    conditioning_column: str | None = None,
    mask_column: str | None = None,
) -> TarSource | ArrayRecordSource:
    """Open files that are either all tar files or all ArrayRecord files, according to their names.

    Raises:
      FileNotFoundError: no file matches a pattern.
      ValueError: the names are neither those of tar files nor those of ArrayRecord files, or the latter are to have
        control images or masks.
    """
    paths = expand(patterns)
    if all(path.suffix == ".tar" for path in paths):
        return TarSource(paths, caption_column, conditioning_column, mask_column)
    if all(re.search(r"\.array_?record", path.name) for path in paths):
        if conditioning_column is not None:
            raise ValueError("ArrayRecord files hold no control images; use .tar files, or compute: --conditioning")
        if mask_column is not None:
            raise ValueError("ArrayRecord files hold no masks (--mask_column); use .tar files")
        return ArrayRecordSource(paths, caption_column)
    names = ", ".join(path.name for path in paths[:3])
    raise ValueError(f"--train_shards must name .tar files (not compressed) or .array_record files, got {names}")


class Place(NamedTuple):
    """The position of a member's bytes in its file."""

    offset: int
    size: int


class TarSource:
    """The samples of WebDataset tar files: an image and its caption, in a text file or in a field of a JSON file."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        caption_column: str | None = "text",
        conditioning_column: str | None = None,
        mask_column: str | None = None,
    ) -> None:
        """Read the headers of all members. Samples without an image are skipped, with a warning.

        Raises:
          ValueError: a sample has no caption, control image or mask although these are needed, a file is not a tar file
            or is damaged, or there are no images.
        """
        self._paths, self._column = [Path(path) for path in paths], caption_column
        columns = other_columns(conditioning_column, mask_column)
        others: dict[str, list[Place]] = {field: [] for field in columns}
        rows, keys, skipped = [], [], []
        for number, path in enumerate(self._paths):
            for key, members in _samples(path):
                image = _first(members, IMAGES)
                if image is None:
                    skipped.append(f"{key} in {path}")
                    continue
                text, line = _first(members, TEXTS), members.get("json")
                if caption_column is not None and text is None and line is None:
                    raise ValueError(f"{path}: {key} has no caption: no .{', .'.join(TEXTS)} and no .json")
                for field, column in columns.items():
                    suffixes = [f"{column}.{suffix}" for suffix in IMAGES]
                    found = _first(members, suffixes)
                    if found is None:
                        raise ValueError(f"{path}: {key} has no {OTHER_IMAGES[field][1]}: no .{', .'.join(suffixes)}")
                    others[field].append(found)
                caption = text or line or Place(0, 0)
                rows.append((number, *image, *caption, text is not None))
                keys.append(key.encode(errors="surrogateescape"))  # names need not be UTF-8
        if not rows:
            raise ValueError(f"no images (.{', .'.join(IMAGES)}) in {self._paths[0]} and the other shards")
        warn_of(Skipped(len(skipped), skipped[0] if skipped else ""), f"{self._paths[0]} and the other shards")
        self._rows, self._keys = np.array(rows, np.int64), np.array(keys)
        self._others = {field: np.array(places, np.int64) for field, places in others.items()}
        names = " ".join([str(caption_column), *columns.values()])
        self.fingerprint = fingerprint(f"tar {names}", map(file_identity, self._paths))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        number, start, size, caption, length, plain = self._rows[index].tolist()
        path = self._paths[number]
        key = self._keys[index].decode(errors="surrogateescape")
        name = f"{key} in {path}"
        with path.open("rb") as file:
            image = _bytes(file, Place(start, size), name)
            places = {field: Place(*rows[index].tolist()) for field, rows in self._others.items()}
            others = {field: _bytes(file, place, name) for field, place in places.items()}
            if self._column is None:
                return Record(image, ("",), name, **others)
            text = _bytes(file, Place(caption, length), name)
        row = {self._column: _decoded(text, name).strip()} if plain else _object(_decoded(text, name), name)
        return Record(image, captions_of(row, self._column, name), name, **others)


def _samples(path: Path) -> Iterator[tuple[str, dict[str, Place]]]:
    """The key and members of each sample; the key is the path up to the first dot in the file name.

    Raises:
      ValueError: the file is not a tar file, is damaged or truncated, or has a member twice: samples would be lost.
    """
    samples: dict[str, dict[str, Place]] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    raise ValueError(f"{path} is truncated in {member.name!r}, after {len(samples)} samples")
                folder, _, name = member.name.rpartition("/")
                if member.isdir() or name.startswith("."):
                    continue
                if not member.isfile() or member.issparse():
                    raise ValueError(f"{path}: {member.name!r} is a link or another special file, not a regular file")
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
    """Check that only the end of the archive follows where reading stopped: Python's ``tarfile`` also stops, without an
    error, at a damaged header."""
    zeros, left = bytes(tarfile.RECORDSIZE), path.stat().st_size - offset
    with path.open("rb") as file:
        file.seek(offset)
        blocks = iter(functools.partial(file.read, len(zeros)), b"")
        if any(block != zeros[: len(block)] for block in blocks):
            raise ValueError(
                f"{path} is damaged, or several archives in one file: what follows {count} samples, at byte {offset}, "
                "is neither a member nor the end; the samples after it would be lost"
            )
    if left < tarfile.BLOCKSIZE:
        raise ValueError(f"{path} is truncated after {count} samples: it has no end-of-archive marker")


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
    row = parse_json(name, text, what="its .json", unique=True)
    if not isinstance(row, dict):
        raise ValueError(f"{name}: its .json must be an object, got {text[:100]}")
    return row


class ArrayRecordSource:
    """The records of ArrayRecord files, read with grain."""

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
            line = parse_json(where, head, unique=True)
        except ValueError:
            line = None
        if not found or not isinstance(line, dict):
            raise ValueError(f"{where} is not a line of JSON followed by an image")
        return Record(image, captions_of(line, self._column, where), str(line.get("name", where)))


def write_tar(path: str | Path, rows: Iterable[tuple[str, bytes, str | Sequence[str]]]) -> None:
    """Write a tar shard of ``(name of the image, its bytes, caption or captions)``; a list is written as ``text`` in
    JSON."""
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
    """Write an ArrayRecord file of ``(name of the image, its bytes, caption or captions)``."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for name, image, caption in rows:
        writer.write(json.dumps({"name": name, "text": caption}).encode() + b"\n" + image)
    writer.close()
