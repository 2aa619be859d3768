"""Where the images of a job go: folders of files, or WebDataset shards.

The rows of a job are divided into *blocks* of consecutive rows. Each block is a folder or a shard of its own with its
own metadata, written by one process only, so processes and runs need nothing else to agree on what is done. An image
counts as done once its line of metadata, or its last member in the shard, is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tarfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from diffuse_jax.output import METADATA, in_utf8
from diffuse_jax.writing import SUFFIX, atomic_file, lock, naming, write_all

Record = dict[str, Any]
"""A line of metadata; ``file_name`` is relative to the folder of its block, or the member of its shard."""


class Block(Protocol):
    """A block that is being written; any thread may write to it."""

    def write(self, name: str, data: bytes, record: Record) -> None:
        """Add an image with its record. After an error the block is as it was before."""

    def close(self, complete: bool) -> None:
        """Finish; ``complete`` if nothing is missing."""


class Sink(Protocol):
    """A folder of blocks."""

    def last(self) -> int:
        """The number of the last block that has anything; -1 if there is none."""

    def recorded(self, block: int) -> dict[str, Record]:
        """The images of a block that are done: name of the file -> record."""

    def unfinished(self, block: int) -> bool:
        """Whether the block has all that it was given, but was never closed as complete."""

    def open(self, block: int) -> Block:
        """Continue a block. Errors with FileExistsError if another process is writing it."""


def dumped(record: Mapping[str, Any]) -> bytes:
    """A line of metadata."""
    return in_utf8(json.dumps(record, ensure_ascii=False)) + b"\n"


def parsed(text: bytes) -> Record | None:
    """A JSON object; None if it is damaged."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def records_in(path: Path) -> list[Record | None]:
    """The complete lines of a file of metadata, None for one that names no image; none if there is no file."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        found = [parsed(line) for line in file if line.endswith(b"\n")]
        return [one if one and isinstance(one.get("file_name"), str) else None for one in found]
    return []


def locked(handle: int, path: Path) -> None:
    """Lock a block until its file is closed.

    Raises:
      FileExistsError: another process has it.
    """
    if lock(handle) is False:
        raise FileExistsError(f"{path} is being written by another process; wait for it, or choose another folder")


class Folders:
    """Image files in folders ``00000``, ``00001`` ..., each with its ``metadata.jsonl``."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def folder(self, block: int) -> Path:
        return self.output / f"{block:05d}"

    def last(self) -> int:
        return last_named(self.output, re.compile(r"(\d{5,})"))

    def recorded(self, block: int) -> dict[str, Record]:
        folder = self.folder(block)
        try:
            there = {entry.name for entry in os.scandir(folder)}
        except FileNotFoundError:
            return {}
        # An image whose line is damaged is made again.
        return {one["file_name"]: one for one in records_in(folder / METADATA) if one and one["file_name"] in there}

    def unfinished(self, block: int) -> bool:
        return False  # a folder is the same before and after its end

    def open(self, block: int) -> FolderBlock:
        return FolderBlock(self.folder(block), lambda: self.recorded(block))


class FolderBlock:
    """A folder that is being written."""

    def __init__(self, folder: Path, recorded: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._mutex = folder, threading.Lock()
        self._handle = os.open(folder, os.O_RDONLY)
        try:
            locked(self._handle, folder)
            for left in folder.glob(f".*{SUFFIX}"):  # of a killed process: nobody else writes here
                left.unlink()
            lines = b"".join(map(dumped, recorded().values()))
            path = folder / METADATA
            if not path.exists() or path.read_bytes() != lines:  # half a line, or an image that was removed
                with atomic_file(path) as file:
                    file.write(lines)
            self._metadata = path.open("ab", buffering=0)
        except BaseException:
            os.close(self._handle)
            raise

    def write(self, name: str, data: bytes, record: Record) -> None:
        path = self.folder / name
        partial = self.folder / f".{name}{SUFFIX}"
        try:
            with naming(path):
                partial.write_bytes(data)
                os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        with self._mutex:
            append(self.folder / METADATA, self._metadata, dumped(record))

    def close(self, complete: bool) -> None:
        self._metadata.close()
        os.close(self._handle)


def append(path: Path, file: IO[bytes], data: bytes) -> None:
    """Add to the end of an unbuffered file, all or nothing."""
    end = os.fstat(file.fileno()).st_size
    try:
        write_all(path, file, data)
    except BaseException:
        os.ftruncate(file.fileno(), end)
        raise


class Shards:
    """WebDataset shards ``00000.tar``, ``00001.tar`` ... of ``KEY.png``, ``KEY.txt`` and ``KEY.json``.

    A shard is ``.00000.tar.partial`` until it has all images of its block. ``00000.jsonl`` beside it repeats the
    metadata of a finished one.
    """

    def __init__(self, output: Path) -> None:
        self.output = output

    def paths(self, block: int) -> tuple[Path, Path, Path]:
        """The shard, its unfinished file, and its metadata."""
        name = f"{block:05d}"
        return (
            self.output / f"{name}.tar",
            self.output / f".{name}.tar{SUFFIX}",
            self.output / f"{name}.jsonl",
        )

    def last(self) -> int:
        return last_named(self.output, re.compile(rf"\.?(\d{{5,}})\.tar(?:{re.escape(SUFFIX)})?"))

    def recorded(self, block: int) -> dict[str, Record]:
        shard, partial, metadata = self.paths(block)
        if partial.exists():
            return samples_in(partial)[0]
        if not shard.exists():
            return {}
        records = records_in(metadata)
        whole = {one["file_name"]: one for one in records if one}
        return whole if whole and None not in records else samples_in(shard)[0]

    def unfinished(self, block: int) -> bool:
        return self.paths(block)[1].exists()

    def open(self, block: int) -> ShardBlock:
        return ShardBlock(*self.paths(block))


class ShardBlock:
    """A shard that is being written."""

    def __init__(self, shard: Path, partial: Path, metadata: Path) -> None:
        partial.parent.mkdir(parents=True, exist_ok=True)
        self._shard, self._path, self._metadata, self._mutex = shard, partial, metadata, threading.Lock()
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        self._file = os.fdopen(handle, "r+b", buffering=0)
        try:
            locked(handle, shard)
            if shard.exists() and not os.fstat(handle).st_size:  # rows were added to a finished shard
                with naming(partial), shard.open("rb") as source:
                    shutil.copyfileobj(source, self._file)
            self._records, end = samples_in(partial)
            self._file.truncate(end)
            self._file.seek(end)
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, data: bytes, record: Record) -> None:
        key = name.partition(".")[0]
        members = {
            name: data,
            f"{key}.txt": str(record["text"]).encode(),
            f"{key}.json": dumped(record),
        }
        whole = b"".join(member(name, content) for name, content in members.items())
        with self._mutex:
            end = self._file.tell()
            try:
                append(self._path, self._file, whole)
            except BaseException:
                self._file.seek(end)
                raise
            self._records[name] = record

    def close(self, complete: bool) -> None:
        with self._file:
            if not complete:
                return
            zeros = 2 * tarfile.BLOCKSIZE
            zeros += -(self._file.tell() + zeros) % tarfile.RECORDSIZE
            write_all(self._path, self._file, bytes(zeros))
            os.fsync(self._file.fileno())
            with atomic_file(self._metadata) as file:
                file.writelines(map(dumped, self._records.values()))
            with naming(self._shard):
                os.replace(self._path, self._shard)


def last_named(folder: Path, pattern: re.Pattern[str]) -> int:
    """The largest number in the names of a folder's entries that fit a pattern; -1 if there is none."""
    try:
        names = [pattern.fullmatch(entry.name) for entry in os.scandir(folder)]
    except FileNotFoundError:
        return -1
    return max((int(found[1]) for found in names if found), default=-1)


def member(name: str, data: bytes) -> bytes:
    """A file as a member of a tar archive."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def samples_in(path: Path) -> tuple[dict[str, Record], int]:
    """The records of the complete samples of a shard, and where the last of them ends: what follows was cut off."""
    found: dict[str, Record] = {}
    end, size, image = 0, path.stat().st_size, ""
    with path.open("rb") as file:
        while len(head := file.read(tarfile.BLOCKSIZE)) == tarfile.BLOCKSIZE and any(head):
            try:
                info = tarfile.TarInfo.frombuf(head, "utf-8", "strict")
            except tarfile.HeaderError:
                break
            begin = file.tell()
            after = begin + info.size + -info.size % tarfile.BLOCKSIZE
            if after > size:
                break
            if info.name.endswith(".json"):
                if (record := parsed(file.read(info.size))) is None:
                    break
                found[image], end = record, after
            elif not info.name.endswith(".txt"):
                image = info.name
            file.seek(after)
    return found, end
