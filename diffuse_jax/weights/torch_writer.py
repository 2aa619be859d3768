"""Writing files of ``torch.save`` without PyTorch, for what other programs expect as ``.bin``."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from diffuse_jax.errors import bad
from diffuse_jax.writing import atomic_file

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
}
"""The dtypes that can be written -> what PyTorch calls their storages."""

FOLDER = "archive"


def write_torch(
    path: Path, specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]], arrays: Iterable[np.ndarray]
) -> None:
    """Write a file under a temporary name and then rename it, with one tensor in memory at a time.

    It is a dict of tensors by name, in the format of PyTorch 1.6 and later: a zip file with one pickle, and one member
    for each tensor.

    Args:
      path: the file to write; an existing one stays intact until the new one is complete.
      specs: name -> (dtype, shape), in the order of ``arrays``.
      arrays: the tensors, consumed one by one.

    Raises:
      WeightsError: a tensor has another dtype than those of :data:`STORAGES`.
    """
    if odd := [name for name, (dtype, _) in specs.items() if dtype not in STORAGES]:
        raise bad(path, f"{odd[0]!r} has dtype {specs[odd[0]][0]}, which is not written as .bin")
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        put = lambda name, data: archive.writestr(zipfile.ZipInfo(f"{FOLDER}/{name}"), data)
        put("data.pkl", b"".join(pickled(specs)))
        put("byteorder", b"little")
        for number, (spec, array) in enumerate(zip(specs.values(), arrays, strict=True)):
            assert (array.dtype, array.shape) == spec
            put(f"data/{number}", np.ascontiguousarray(array).tobytes())
        put("version", b"3\n")


def pickled(specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> Iterator[bytes]:
    """The pickle of a dict of tensors: each is a call that takes a storage by its number, a shape and strides."""
    yield b"\x80\x02}("  # protocol 2, a new dict, and a mark below its items
    for number, (name, (dtype, shape)) in enumerate(specs.items()):
        size = int(np.prod(shape, dtype=np.int64))
        strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
        yield text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n("
        yield b"(" + text("storage") + f"ctorch\n{STORAGES[dtype]}\n".encode()
        yield text(str(number)) + text("cpu") + integer(size) + b"tQ"  # the storage, as a persistent id
        yield integer(0) + integers(shape) + integers(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    yield b"u."


def text(value: str) -> bytes:
    """A string as pickles have it."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    """An integer as pickles have it, of any size."""
    data = value.to_bytes(8, "little", signed=True)
    return b"\x8a" + struct.pack("B", len(data)) + data


def integers(values: Iterable[int]) -> bytes:
    """A tuple of integers as pickles have it."""
    return b"(" + b"".join(map(integer, values)) + b"t"
