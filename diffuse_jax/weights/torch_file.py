"""Reading files of ``torch.save`` (``.bin``, ``.pt``, ``.ckpt``) without PyTorch and without executing any code in
them.

There are two formats. Since PyTorch 1.6, the file is an uncompressed zip with ``data.pkl`` and one member per storage;
before, it was five consecutive pickles followed by the storages. In both, tensors become views of the mapped file.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from diffuse_jax.errors import bad, parsing
from diffuse_jax.limits import MAX_ELEMENTS, check_name
from diffuse_jax.messages import brief
from diffuse_jax.weights.files import map_file
from diffuse_jax.weights.pickle_machine import Storage, TensorSpec, interpret

MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of the older format."""

MAX_PICKLE = 1 << 28
"""Maximum size of a pickle in bytes; it bounds what a hostile file can make us read."""

MAX_DIRECTORY = 1 << 23
"""Maximum size in bytes of an archive's directory; each member takes about eighty."""

MAX_DEPTH = 32
MAX_ITEMS = 1_000_000

MAX_SHARED = 8
"""Maximum ratio of the total size of all tensors to that of the file; it exceeds 1 if tensors share storages."""


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file as views, by name.

    A checkpoint that wraps its tensors in ``{"state_dict": ...}`` is unwrapped; the keys of other nested dicts are
    joined with dots. Numbers and strings are left out (:func:`read_torch_object` returns them).

    Raises:
      WeightsError: the file is truncated, compressed or damaged, or its pickle asks for anything but tensors and plain
        containers.
    """
    tree = read_torch_object(path)
    while isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
        tree = tree["state_dict"]
    if isinstance(tree, np.ndarray):
        raise bad(path, "contains a single tensor without a name")
    tensors: dict[str, np.ndarray] = {}
    for name, array in _named(path, tree, ""):
        if name in tensors:
            raise bad(path, f"{name!r} occurs twice")
        tensors[name] = array
    if not tensors:
        raise bad(path, "contains no tensors")
    return tensors


def read_torch_object(path: Path) -> Any:
    """The saved object: dicts, lists, tuples, numbers and strings, with arrays for tensors.

    Raises:
      WeightsError: as for :func:`read_torch`.
    """
    data = map_file(path)
    with parsing(path):
        zipped = data[:4].tobytes() == b"PK\x03\x04"
        obj, storages = _read_zip(path, data) if zipped else _read_stream(path, data)
        return _resolve(path, obj, storages, data)


def _named(path: Path, tree: Any, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays in nested dicts with their dotted names."""
    if isinstance(tree, np.ndarray):
        yield prefix, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _named(path, value, check_name(path, f"{prefix}.{key}" if prefix else str(key)))


def _resolve(path: Path, obj: Any, storages: Mapping[str, tuple[int, int]], data: np.ndarray) -> Any:
    """Replace descriptions of tensors by views. ``storages`` maps a key to (first byte, length in bytes)."""
    visits, room = itertools.count(), [MAX_SHARED * len(data)]

    def walk(obj: Any, depth: int) -> Any:
        # A few bytes of pickle can describe an enormous number of nested lists.
        if depth > MAX_DEPTH or next(visits) > MAX_ITEMS:
            raise bad(
                path,
                f"refused: containers are nested more than {MAX_DEPTH} levels deep or have more than {MAX_ITEMS} items",
            )
        if isinstance(obj, dict):
            return {key: walk(value, depth + 1) for key, value in obj.items()}
        if isinstance(obj, list | tuple):
            return type(obj)(walk(value, depth + 1) for value in obj)
        if not isinstance(obj, TensorSpec):
            return obj
        room[0] -= math.prod(obj.shape) * obj.dtype.itemsize
        if room[0] < 0:
            raise bad(path, f"refused: its tensors are together more than {MAX_SHARED} times the size of the file")
        return _view(path, obj, storages, data)

    return walk(obj, 0)


def _view(path: Path, spec: TensorSpec, storages: Mapping[str, tuple[int, int]], data: np.ndarray) -> np.ndarray:
    """A tensor as a strided view of its storage in the file."""
    if spec.storage.key not in storages:
        raise bad(path, f"a tensor's storage {spec.storage.key!r} is not in the file")
    start, length = storages[spec.storage.key]
    if length != spec.storage.size * spec.storage.dtype.itemsize:
        raise bad(path, f"storage {spec.storage.key!r} has {length} bytes, expected {spec.storage.size} elements")
    if 0 in spec.shape:
        return np.empty(spec.shape, spec.dtype)
    width = spec.dtype.itemsize
    strides = tuple(stride * width for stride in spec.strides)
    return np.ndarray(spec.shape, spec.dtype, data[start : start + length], spec.offset * width, strides)


def _storage(path: Path, pid: Any) -> Storage:
    """A persistent id ``("storage", dtype, key, place, size, ...)`` as a storage."""
    if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], np.dtype)):
        raise bad(path, f"refused: its pickle refers to {brief(pid)}, which is not a storage")
    if not isinstance(pid[2], str | int):
        raise bad(path, f"the key of a storage is {brief(pid[2])}")
    if type(pid[4]) is not int or not 0 <= pid[4] <= MAX_ELEMENTS:
        raise bad(path, f"storage {brief(pid[2])} has size {brief(pid[4])}")
    if len(pid) > 5 and pid[5] is not None:
        raise bad(
            path, f"storage {brief(pid[2])} is a view of another storage, which PyTorch has not written since 0.4"
        )
    return Storage(str(pid[2]), pid[1], pid[4])


def _read_zip(path: Path, data: np.ndarray) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The object and the storages of the zip format."""
    _check_directory(path, data)
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    members = {info.filename: info for info in infos}
    if len(members) != len(infos):
        raise bad(path, "a zip file with two members of the same name")
    root = next((name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")), None)
    if root is None:
        raise bad(path, "a zip file without data.pkl; it was not written by torch.save")
    order = _text(path, data, members[f"{root}byteorder"], 16) if f"{root}byteorder" in members else b"little"
    if order != b"little":
        raise bad(path, f"written on a {order.decode(errors='replace')}-endian machine, which is not supported")
    prefix = f"{root}data/"
    storages = {
        name[len(prefix) :]: _member(path, data, info) for name, info in members.items() if name.startswith(prefix)
    }
    text = _text(path, data, members[f"{root}data.pkl"], MAX_PICKLE)
    return interpret(path, BytesIO(text), lambda pid: _storage(path, pid)), storages


def _check_directory(path: Path, data: np.ndarray) -> None:
    """Refuse an archive with a huge directory, which ``zipfile`` would read completely when opening it."""
    tail = data[-(1 << 16) - 98 :].tobytes()  # the longest comment, and the records before it
    sizes = [0]
    for mark, at, form in ((b"PK\x05\x06", 12, "<I"), (b"PK\x06\x06", 40, "<Q")):
        begin = tail.rfind(mark)
        if begin >= 0 and begin + at + struct.calcsize(form) <= len(tail):
            sizes += struct.unpack_from(form, tail, begin + at)
    # In zip64 files, the older field is all ones and the newer one has the size.
    if max(size for size in sizes if size != 0xFFFFFFFF) > MAX_DIRECTORY:
        raise bad(path, f"truncated or damaged zip: its directory has more than {MAX_DIRECTORY} bytes")


def _text(path: Path, data: np.ndarray, info: zipfile.ZipInfo, limit: int) -> bytes:
    """The bytes of a small member, after checking its size and checksum."""
    start, size = _member(path, data, info)
    if size > limit:
        raise bad(path, f"member {info.filename!r} has {size} bytes; the maximum is {limit}")
    text = data[start : start + size].tobytes()
    if zlib.crc32(text) != info.CRC:
        raise bad(path, f"truncated or damaged zip: member {info.filename!r} has a wrong checksum")
    return text


def _member(path: Path, data: np.ndarray, info: zipfile.ZipInfo) -> tuple[int, int]:
    """(First byte, length) of an uncompressed member, which follows a local header of variable length."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
        raise bad(path, f"member {info.filename!r} is compressed or encrypted; torch.save does neither")
    head = data[info.header_offset : info.header_offset + 30].tobytes()
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise bad(path, f"truncated or damaged zip: no header for member {info.filename!r}")
    packed, unpacked, name_length, extra_length = struct.unpack("<IIHH", head[18:30])
    # Sizes are zero in a header written before its member (flag 8), all ones for zip64, and otherwise must agree.
    claimed = {packed, unpacked} - {0xFFFFFFFF} - ({0} if info.flag_bits & 0x8 else set())
    if info.compress_size != info.file_size or claimed - {info.file_size}:
        raise bad(path, f"truncated or damaged zip: the sizes of member {info.filename!r} differ")
    start = info.header_offset + 30 + name_length + extra_length
    if start + info.file_size > len(data):
        raise bad(path, f"truncated: member {info.filename!r} ends at byte {start + info.file_size} of {len(data)}")
    return start, info.file_size


def _read_stream(path: Path, data: np.ndarray) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The object and the storages of the older format: magic number, version, machine, object, keys, then the
    storages."""
    sizes: dict[str, Storage] = {}

    def remember(pid: Any) -> Storage:
        storage = _storage(path, pid)
        return sizes.setdefault(storage.key, storage)

    # A file object would allocate as many bytes as a pickle claims; a mapped file only as many as there are.
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        stream = cast("IO[bytes]", pages)
        if data[0] != 0x80 or interpret(path, stream, remember) != MAGIC:
            raise bad(path, "not written by torch.save (neither a zip nor PyTorch's older format)")
        _version, _machine, obj, keys = (interpret(path, stream, remember) for _ in range(4))
        at = stream.tell()
    if not isinstance(keys, list):
        raise bad(path, "its list of storages is not a list")
    storages = {}
    for key in keys:
        if not isinstance(key, str) or key not in sizes:
            raise bad(path, f"storage {brief(key)} belongs to no tensor")
        length = sizes[key].size * sizes[key].dtype.itemsize
        (count,) = struct.unpack("<q", data[at : at + 8].tobytes().ljust(8, b"\0"))
        if at + 8 + length > len(data):
            raise bad(path, f"truncated: storage {key!r} ends at byte {at + 8 + length} of {len(data)}")
        if count != sizes[key].size:
            raise bad(path, f"storage {key!r} has {count} elements, but its tensors need {sizes[key].size}")
        storages[key] = (at + 8, length)
        at += 8 + length
    return obj, storages
