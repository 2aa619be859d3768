"""Reading and writing Flax ``.msgpack`` files, one tensor at a time.

Flax stores a nested map whose leaves are extension type 1: a packed ``(shape, dtype name, bytes)``. Arrays over 1 GiB
are split: ``{"__msgpack_chunked_array__": true, "shape": {"0": n, ...}, "chunks": {"0": part, ...}}``. The parser below
skips the bytes instead of copying them, so tensors are views of the mapped file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffuse_jax.errors import WeightsError, bad, parsing
from diffuse_jax.limits import MAX_DEPTH, check_name, count_elements
from diffuse_jax.messages import brief
from diffuse_jax.weights.files import map_file
from diffuse_jax.weights.names import unflatten
from diffuse_jax.weights.safetensors import DTYPES
from diffuse_jax.writing import atomic_file

BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}
CHUNK = 1 << 30
MAX_ITEMS = 500_000
"""Maximum number of values in a file, including nested ones; an array takes about eight."""

CHUNKED = "__msgpack_chunked_array__"

CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
NUMBERS = dict(zip(range(0xCA, 0xD4), (">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True))
LENGTHS = {
    tag: (kind, form)
    for first, kind, forms in (
        (0xC4, "bin", (">B", ">H", ">I")),
        (0xC7, "ext", (">B", ">H", ">I")),
        (0xD9, "str", (">B", ">H", ">I")),
        (0xDC, "array", (">H", ">I")),
        (0xDE, "map", (">H", ">I")),
    )
    for tag, form in enumerate(forms, first)
}
"""Type byte -> kind of value and the struct format of the length that follows."""


def read_msgpack(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a Flax file as views of the mapped file, by their path joined with ``/``.

    Raises:
      WeightsError: the file is truncated or damaged, or contains anything but nested maps of arrays; the message names
        the file and the key.
    """
    parser = _Parser(path, map_file(path))
    with parsing(path):
        tree = parser.value(0)
    if not isinstance(tree, dict):
        raise bad(path, "is not a Flax file: its outermost value is not a map")
    if parser.at != len(parser.data):
        raise bad(path, f"{len(parser.data) - parser.at} bytes follow the last tensor")
    return dict(_named(path, tree, ""))


def _named(path: Path, tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        name = check_name(path, f"{prefix}/{key}" if prefix else str(key))
        if isinstance(value, dict) and CHUNKED in value:
            value = _join(path, name, value)
        if isinstance(value, dict):
            yield from _named(path, value, name)
        elif isinstance(value, np.ndarray):
            yield name, value
        else:
            raise bad(path, f"{name!r} is a {type(value).__name__}, not an array")


def _join(path: Path, name: str, value: dict[str, Any]) -> np.ndarray:
    """Concatenate the chunks of an array; the only case in which reading copies."""
    try:
        shape = tuple(value["shape"][str(i)] for i in range(len(value["shape"])))
        chunks = [value["chunks"][str(i)] for i in range(len(value["chunks"]))]
        if count_elements(path, repr(name), shape) != sum(chunk.size for chunk in chunks):
            raise ValueError(f"they do not have the elements of shape {list(shape)}")
        if len({chunk.dtype for chunk in chunks}) > 1:
            raise ValueError("they have different dtypes")
        return np.concatenate(chunks).reshape(shape)
    except WeightsError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise bad(path, f"{name!r} is a chunked array whose chunks do not fit together ({error})") from error


class _Parser:
    """A parser at a position in the bytes of a file."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.at, self.values = path, data, 0, 0

    def take(self, size: int) -> np.ndarray:
        if self.at + size > len(self.data):
            raise bad(self.path, f"truncated at byte {len(self.data)}; {self.at + size - len(self.data)} more expected")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)).tobytes())[0]

    def value(self, depth: int) -> Any:
        """Parse the value at the position: dict, list, str, number, uint8 array (bytes) or array (extension 1)."""
        if depth > MAX_DEPTH:
            raise bad(self.path, f"values nested more than {MAX_DEPTH} levels deep")
        self.values += 1
        if self.values > MAX_ITEMS:
            raise bad(self.path, f"more than {MAX_ITEMS} values")
        tag = self.number(">B")
        if tag < 0x80 or tag >= 0xE0:
            return tag if tag < 0x80 else tag - 0x100
        if tag in CONSTANTS:
            return CONSTANTS[tag]
        if tag in NUMBERS:
            return self.number(NUMBERS[tag])
        kind, size = self._size(tag)
        if kind == "map":
            return self._map(size, depth)
        if kind == "array":
            return [self.value(depth + 1) for _ in range(size)]
        if kind == "str":
            return self._text(size)
        return self.take(size) if kind == "bin" else self._extension(size, depth)

    def _size(self, tag: int) -> tuple[str, int]:
        if tag < 0xC0:
            kinds = (("map", 0x0F), ("array", 0x0F), ("str", 0x1F), ("str", 0x1F))
            kind, mask = kinds[(tag - 0x80) >> 4]
            return kind, tag & mask
        if 0xD4 <= tag <= 0xD8:
            return "ext", 1 << (tag - 0xD4)
        if tag not in LENGTHS:
            raise bad(self.path, f"byte {self.at - 1} is {tag:#x}, which msgpack does not define")
        kind, form = LENGTHS[tag]
        return kind, self.number(form)

    def _text(self, size: int) -> str:
        try:
            return self.take(size).tobytes().decode()
        except UnicodeDecodeError as error:
            raise bad(self.path, f"a name before byte {self.at} is not text ({error})") from error

    def _map(self, size: int, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(size):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in found:
                raise bad(
                    self.path,
                    f"a map names {brief(key)} twice" if isinstance(key, str) else "a map key is not a string",
                )
            found[key] = self.value(depth + 1)
        return found

    def _extension(self, size: int, depth: int) -> np.ndarray:
        code, end = self.number(">b"), self.at + size
        if code not in (1, 3):
            raise bad(self.path, f"extension type {code} at byte {self.at}; Flax arrays are type 1")
        if end > len(self.data):
            raise bad(self.path, f"truncated: an array ends at byte {end}, the file has {len(self.data)}")
        parts = self.value(depth + 1)
        try:
            shape, name, raw = parts
            name = name if isinstance(name, str) else raw_text(name)
            count_elements(self.path, f"the array before byte {self.at}", shape)
            array = raw.view(BY_NAME[name]).reshape(tuple(shape))
        except WeightsError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise bad(self.path, f"an array before byte {self.at} does not fit its shape or dtype ({error})") from error
        if self.at != end:
            raise bad(self.path, f"an array before byte {self.at} does not have its declared size")
        return array


def raw_text(raw: np.ndarray) -> str:
    """Bytes as a string; Flax writes dtype names either way."""
    return raw.tobytes().decode()


def write_msgpack(
    path: Path,
    specs: Mapping[tuple[str, ...], tuple[np.dtype, tuple[int, ...]]],
    read: Callable[[tuple[str, ...]], np.ndarray],
) -> None:
    """Write a Flax file atomically, with one tensor in memory at a time.

    Args:
      path: the file to write.
      specs: path in the tree -> (dtype, shape).
      read: path in the tree -> array of that dtype and shape.
    """
    tree = unflatten({name: name for name in specs})

    def write(file: Any, node: Any) -> None:
        if not isinstance(node, dict):
            for part in _packed_array(read(node)):
                file.write(part)
            return
        file.write(_head(0x80, 0x0F, None, 0xDE, len(node)))
        for key, value in node.items():
            file.write(_packed_text(key))
            write(file, value)

    with atomic_file(path) as file:
        write(file, tree)


def _head(fixed: int, limit: int, tag8: int | None, tag16: int, size: int) -> bytes:
    """Type byte and length in the shortest of msgpack's forms; some types lack the 8-bit one."""
    if size <= limit:
        return bytes([fixed | size])
    if tag8 is not None and size < 1 << 8:
        return struct.pack(">BB", tag8, size)
    return struct.pack(">BH", tag16, size) if size < 1 << 16 else struct.pack(">BI", tag16 + 1, size)


def _packed_text(text: str) -> bytes:
    raw = text.encode()
    return _head(0xA0, 0x1F, 0xD9, 0xDA, len(raw)) + raw


def _packed_number(n: int) -> bytes:
    return bytes([n]) if n < 0x80 else struct.pack(">BQ", 0xCF, n)


def _packed_array(array: np.ndarray) -> Iterator[Any]:
    """Flax's extension type 1, or its chunked form for arrays over 1 GiB."""
    if array.nbytes <= CHUNK:
        shape = _head(0x90, 0x0F, None, 0xDC, array.ndim) + b"".join(map(_packed_number, array.shape))
        inner = b"\x93" + shape + _packed_text(array.dtype.name) + struct.pack(">BI", 0xC6, array.nbytes)
        yield struct.pack(">BIb", 0xC9, len(inner) + array.nbytes, 1) + inner
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        return
    flat, step = array.reshape(-1), CHUNK // array.dtype.itemsize
    count = math.ceil(flat.size / step)
    yield b"\x83" + _packed_text(CHUNKED) + b"\xc3" + _packed_text("shape")
    yield _head(0x80, 0x0F, None, 0xDE, array.ndim)
    yield from (_packed_text(str(i)) + _packed_number(n) for i, n in enumerate(array.shape))
    yield _packed_text("chunks") + _head(0x80, 0x0F, None, 0xDE, count)
    for i in range(count):
        yield _packed_text(str(i))
        yield from _packed_array(flat[i * step : (i + 1) * step])
