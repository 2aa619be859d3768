"""Reading and writing ``.safetensors`` without holding a file in memory.

The format: the header length as 8 little-endian bytes, a JSON header ``{name: {dtype, shape, data_offsets: [begin,
end]}}`` with an optional ``__metadata__`` of strings, then the tensors in sequence, in C order and little-endian. The
``safetensors`` package returns copies and does not support several dtypes in NumPy. Here a tensor is a view of the
mapped file, so nothing is read before it is used, and a slice reads only its pages.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from diffuse_jax.errors import bad
from diffuse_jax.limits import MAX_ELEMENTS, check_name, count_elements, parse_json
from diffuse_jax.messages import brief
from diffuse_jax.weights.files import map_file
from diffuse_jax.writing import atomic_file

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
MAX_TENSORS = 200_000


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file as read-only views of the mapped file.

    Raises:
      WeightsError: the file is truncated, or its header violates the format (wrong sizes, overlaps, holes, duplicate
        names, unknown dtypes); the message names the file and the tensor.
    """
    header, start, data = _header(path)
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise bad(path, f"header names {len(header)} tensors; the maximum is {MAX_TENSORS}")
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    tensors, expected_begin = {}, 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != expected_begin:
            raise bad(path, f"{name!r} begins at byte {begin} of the data, expected {expected_begin} (overlap or hole)")
        if start + end > len(data):
            raise bad(path, f"truncated: {name!r} ends at byte {start + end}, the file has {len(data)}")
        tensors[name] = data[start + begin : start + end].view(dtype).reshape(shape)
        expected_begin = end
    if start + expected_begin != len(data):
        raise bad(path, f"{len(data) - start - expected_begin} bytes after the last tensor belong to no tensor")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The ``__metadata__`` of a file; empty if it has none.

    Raises:
      WeightsError: the file is damaged, or the metadata is not an object of strings.
    """
    metadata = _header(path)[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise bad(path, "its __metadata__ is not a JSON object of strings")
    return metadata


def _header(path: Path) -> tuple[dict[str, Any], int, np.ndarray]:
    """The parsed header, the offset of the tensors, and the mapped file."""
    data = map_file(path)
    if len(data) < 8:
        raise bad(path, f"truncated: {len(data)} bytes cannot hold a safetensors header")
    (size,) = struct.unpack("<Q", data[:8].tobytes())
    if size > min(MAX_HEADER, len(data) - 8):
        raise bad(path, f"truncated or not safetensors: header of {size} bytes in a file of {len(data)}")
    header = parse_json(path, data[8 : 8 + size].tobytes(), what="header", unique=True)
    if not isinstance(header, dict):
        raise bad(path, "header is not a JSON object")
    return header, 8 + size, data


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Check a header entry and return (dtype, shape, begin, end)."""
    check_name(path, name)
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise bad(path, f"header entry of {name!r} lacks dtype, shape or data_offsets") from error
    if not isinstance(kind, str) or kind not in DTYPES:
        raise bad(path, f"{name!r} has dtype {brief(kind)}; expected one of {', '.join(DTYPES)}")
    if not all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in (begin, end)):
        raise bad(
            path, f"{name!r} has offsets {brief([begin, end])}; these must be non-negative integers within the file"
        )
    size = count_elements(path, repr(name), shape) * DTYPES[kind].itemsize
    if end - begin != size:
        raise bad(
            path, f"{name!r}: shape {list(shape)} of {kind} needs {size} bytes, but its offsets span {end - begin}"
        )
    return DTYPES[kind], shape, begin, end


def write_safetensors(
    path: Path,
    specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    arrays: Iterable[np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file under a temporary name and then rename it, with one tensor in memory at a time.

    Args:
      path: the file to write; an existing one stays intact until the new one is complete.
      specs: name -> (dtype, shape), in the order of ``arrays``.
      arrays: the tensors, consumed one by one, so a generator can read or cast them on demand.
      metadata: strings to store besides ``format: pt``, which PyTorch's libraries expect.

    Raises:
      WeightsError: the format does not support a dtype.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begin = 0
    for name, (dtype, shape) in specs.items():
        if dtype not in NAMES:
            raise bad(path, f"{name!r} has dtype {dtype}, which safetensors does not support")
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, (dtype, shape)), array in zip(specs.items(), arrays, strict=True):
            if array.dtype != dtype or array.shape != shape:
                raise bad(
                    path, f"{name!r} was declared as {dtype}{list(shape)} but is {array.dtype}{list(array.shape)}"
                )
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
