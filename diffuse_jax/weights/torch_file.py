"""Reading what ``torch.save`` wrote (``.bin``, ``.pt``, ``.ckpt``), without PyTorch and without running anything in it.

Two formats exist. Since PyTorch 1.6 the file is an uncompressed zip with ``data.pkl`` and one member for each storage;
before, it is five pickles in a row followed by the storages. In both, tensors become views of the mapped file.
"""

from __future__ import annotations

import itertools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.weights.errors import bad
from diffuse_jax.weights.files import map_file
from diffuse_jax.weights.pickle_machine import Storage, TensorSpec, interpret

MAGIC = 0x1950A86A20F9469CFC6C
"""First pickle of the older format."""

MAX_PICKLE = 1 << 28
"""No description of tensors is longer than this; it bounds what a hostile file can make us read."""

MAX_DEPTH = 32
MAX_ITEMS = 1_000_000


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as a view, under its name.

    A checkpoint that wraps its tensors in ``{"state_dict": ...}`` is unwrapped; other nested dicts give names joined
    with dots. Numbers and texts beside the tensors are left out (:func:`read_torch_object` returns them).

    Raises:
      WeightsError: truncated, compressed or damaged, or its pickle asks for anything but tensors and plain containers.
    """
    tree = read_torch_object(path)
    while isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
        tree = tree["state_dict"]
    if isinstance(tree, np.ndarray):
        raise bad(path, "holds one tensor without a name")
    tensors: dict[str, np.ndarray] = {}
    for name, array in _named(tree, ""):
        if name in tensors:
            raise bad(path, f"{name!r} stands twice in it")
        tensors[name] = array
    if not tensors:
        raise bad(path, "holds no tensors")
    return tensors


def read_torch_object(path: Path) -> Any:
    """The object that was saved: dicts, lists, tuples, numbers, texts, and arrays for tensors."""
    data = map_file(path)
    if data[:4].tobytes() == b"PK\x03\x04":
        obj, storages = _read_zip(path, data)
    else:
        obj, storages = _read_stream(path, data)
    return _resolve(path, obj, storages, data)


def _named(tree: Any, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays below nested dicts with their dotted names."""
    if isinstance(tree, np.ndarray):
        yield prefix, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _named(value, f"{prefix}.{key}" if prefix else str(key))


def _resolve(path: Path, obj: Any, storages: Mapping[str, tuple[int, int]], data: np.ndarray) -> Any:
    """Replace descriptions of tensors by views; ``storages`` maps a key to (first byte, length in bytes)."""
    visits = itertools.count()

    def walk(obj: Any, depth: int) -> Any:
        # A few bytes of pickle can describe lists of lists of lists without end.
        if depth > MAX_DEPTH or next(visits) > MAX_ITEMS:
            raise bad(path, f"refused: containers nested over {MAX_DEPTH} deep or of over {MAX_ITEMS} items")
        if isinstance(obj, dict):
            return {key: walk(value, depth + 1) for key, value in obj.items()}
        if isinstance(obj, list | tuple):
            return type(obj)(walk(value, depth + 1) for value in obj)
        return _view(path, obj, storages, data) if isinstance(obj, TensorSpec) else obj

    return walk(obj, 0)


def _view(path: Path, spec: TensorSpec, storages: Mapping[str, tuple[int, int]], data: np.ndarray) -> np.ndarray:
    """A tensor as a strided view of its storage in the file."""
    if spec.storage.key not in storages:
        raise bad(path, f"a tensor's storage {spec.storage.key!r} is not in the file")
    start, length = storages[spec.storage.key]
    if length < spec.storage.size * spec.storage.dtype.itemsize:
        raise bad(path, f"storage {spec.storage.key!r} has {length} bytes and should have {spec.storage.size} elements")
    if 0 in spec.shape:
        return np.empty(spec.shape, spec.dtype)
    width = spec.dtype.itemsize
    strides = tuple(stride * width for stride in spec.strides)
    return np.ndarray(spec.shape, spec.dtype, data[start : start + length], spec.offset * width, strides)


def _storage(path: Path, pid: Any) -> Storage:
    """A persistent id ``("storage", dtype, key, place, size, ...)`` as a storage."""
    if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], np.dtype)):
        raise bad(path, f"refused: its pickle refers to {str(pid)[:80]}, which is no storage")
    if type(pid[4]) is not int or pid[4] < 0:
        raise bad(path, f"storage {pid[2]!r} has the size {pid[4]!r}")
    if len(pid) > 5 and pid[5] is not None:
        raise bad(path, f"storage {pid[2]!r} is a view of another storage, which PyTorch has not written since 0.4")
    return Storage(str(pid[2]), pid[1], pid[4])


def _read_zip(path: Path, data: np.ndarray) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The object and the storages of the zip format."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            root = next((name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")), None)
            if root is None:
                raise bad(path, "a zip file without data.pkl; it was not written by torch.save")
            if members[f"{root}data.pkl"].file_size > MAX_PICKLE:
                raise bad(path, f"data.pkl has {members[f'{root}data.pkl'].file_size} bytes")
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in members else b"little"
            text = archive.read(f"{root}data.pkl")
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise bad(path, f"truncated or damaged zip ({error})") from error
    if order != b"little":
        raise bad(path, f"written on a {order.decode(errors='replace')}-endian machine")
    prefix = f"{root}data/"
    storages = {
        name[len(prefix) :]: _member(path, data, info) for name, info in members.items() if name.startswith(prefix)
    }
    return interpret(path, BytesIO(text), lambda pid: _storage(path, pid)), storages


def _member(path: Path, data: np.ndarray, info: zipfile.ZipInfo) -> tuple[int, int]:
    """(First byte, length) of an uncompressed member; the local header in front of it has its own variable length."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
        raise bad(path, f"member {info.filename!r} is compressed or encrypted; torch.save stores members as they are")
    head = data[info.header_offset : info.header_offset + 30].tobytes()
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise bad(path, f"truncated or damaged zip: no header for member {info.filename!r}")
    name_length, extra_length = struct.unpack("<HH", head[26:30])
    start = info.header_offset + 30 + name_length + extra_length
    if start + info.file_size > len(data):
        raise bad(path, f"truncated: member {info.filename!r} ends at byte {start + info.file_size} of {len(data)}")
    return start, info.file_size


def _read_stream(path: Path, data: np.ndarray) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The object and the storages of the older format: magic, version, machine, object, keys, then the storages."""
    sizes: dict[str, Storage] = {}

    def remember(pid: Any) -> Storage:
        storage = _storage(path, pid)
        return sizes.setdefault(storage.key, storage)

    with open(path, "rb") as stream:
        if data[0] != 0x80 or interpret(path, stream, remember) != MAGIC:
            raise bad(path, "not written by torch.save (neither a zip nor PyTorch's older format)")
        _version, _machine, obj, keys = (interpret(path, stream, remember) for _ in range(4))
        at = stream.tell()
    if not isinstance(keys, list):
        raise bad(path, "its list of storages is not a list")
    storages = {}
    for key in keys:
        if key not in sizes:
            raise bad(path, f"storage {key!r} belongs to no tensor")
        length = sizes[key].size * sizes[key].dtype.itemsize
        (count,) = struct.unpack("<q", data[at : at + 8].tobytes().ljust(8, b"\0"))
        if at + 8 + length > len(data):
            raise bad(path, f"truncated: storage {key!r} ends at byte {at + 8 + length} of {len(data)}")
        if count != sizes[key].size:
            raise bad(path, f"storage {key!r} says it has {count} elements, its tensors say {sizes[key].size}")
        storages[key] = (at + 8, length)
        at += 8 + length
    return obj, storages
