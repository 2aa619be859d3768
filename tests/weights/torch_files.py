"""Files as ``torch.save`` writes them, put together by hand: whole ones, and ones that no PyTorch would write."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np

OBJECT_END = b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def many(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def name(module: str, attribute: str) -> bytes:
    return b"c" + f"{module}\n{attribute}\n".encode()


def storage(key: str, size: int, kind: str = "FloatStorage") -> bytes:
    return many(text("storage"), name("torch", kind), text(key), text("cpu"), number(size)) + b"Q"


def tensor(place: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    hooks = name("collections", "OrderedDict") + b")R"
    sizes = many(*map(number, shape)), many(*map(number, strides))
    return name("torch._utils", "_rebuild_tensor_v2") + many(place, number(offset), *sizes, b"\x89", hooks) + b"R"


def mapping(**values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in values.items()) + b"u" + OBJECT_END


def write_zip(path: Path, program: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The format since PyTorch 1.6."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", b"little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
    return path


def write_stream(path: Path, program: bytes, storages: dict[str, np.ndarray]) -> Path:
    """The format before: five pickles, then each storage behind its number of elements."""
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    data = b"".join(struct.pack("<q", a.size) + a.tobytes() for a in storages.values())
    path.write_bytes(b"".join(head) + program + pickle.dumps(list(storages), 2) + data)
    return path
