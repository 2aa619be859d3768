"""Tiny files that claim to be huge: refused by name within seconds, before anything of that size is made."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffuse_jax.limits import MAX_JSON
from diffuse_jax.weights import WeightsError, read_checkpoint, read_json
from tests.bounds import bounded
from tests.weights.tiny import write_raw
from tests.weights.torch_files import mapping, name, number, storage, tensor, text, write_stream, write_zip

NUMBERS = np.arange(24, dtype=np.float32)
TENSOR = tensor(storage("0", 24), 0, (24,), (1,))
DOUBLINGS = b"N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))  # a tuple of 2**60 leaves
REBUILD = name("torch._utils", "_rebuild_tensor_v2")
ORDERED = name("collections", "OrderedDict")


def dictionary(key: bytes, value: bytes = b"N") -> bytes:
    return b"\x80\x02}" + key + value + b"s."


PICKLES = {
    "a tuple of 2**60 leaves as a key": (dictionary(DOUBLINGS), "a key of type tuple"),
    "as keys, many at once": (b"\x80\x02}(" + DOUBLINGS + b"Nu.", "a key of type tuple"),
    "as a key of the older DICT": (b"\x80\x02(" + DOUBLINGS + b"Nd.", "a key of type tuple"),
    "as a key of an OrderedDict": (
        b"\x80\x02" + ORDERED + b"](" + DOUBLINGS + b"N\x86e\x85R.",
        "a key of type tuple",
    ),
    "as an item of a set": (b"\x80\x04\x8f(" + DOUBLINGS + b"\x90.", "a key of type tuple"),
    "as the name of a global": (b"\x80\x04" + DOUBLINGS + DOUBLINGS + b"\x93.", "a global whose name is not text"),
    "as a reference": (b"\x80\x02" + DOUBLINGS + b"Q.", "which is not a storage"),
    "as the key of a storage": (
        mapping(w=tensor(storage("0", 24).replace(text("0"), DOUBLINGS), 0, (2,), (1,))),
        "the key of a storage is ((",
    ),
    "as a shape": (
        mapping(w=REBUILD + b"(" + storage("0", 24) + b"K\0" + DOUBLINGS * 2 + b"tR"),
        "invalid offset, shape or strides",
    ),
    "hundreds of thousands of marks": (
        b"\x80\x02" + b"(" * 400_000 + b"t" * 400_000 + name("os", "system") + b".",
        "the global os.system",
    ),
    "millions of instructions": (b"\x80\x02(" + b"N" * 2_100_000 + b"t.", "more than 2000000 instructions"),
    "a long list copied again and again": (
        b"\x80\x02](" + b"K\1K\2\x86" * 50_000 + b"eq\0" + (ORDERED + b"h\0\x85R") * 100 + b".",
        "calls with more arguments",
    ),
    "zero strides": (mapping(w=tensor(storage("0", 24), 0, (1 << 18, 1 << 18), (0, 0))), "larger than its storage"),
    "zero strides over one number": (mapping(w=tensor(storage("0", 24), 3, (25,), (0,))), "larger than its storage"),
    "nothing of a huge shape": (
        mapping(w=tensor(storage("0", 24), 0, (0, *[1 << 30] * 3), (0, 0, 0, 0))),
        "larger than its storage",
    ),
    "a tensor of a thousand axes": (mapping(w=tensor(storage("0", 24), 0, (1,) * 1000, (1,) * 1000)), "invalid offset"),
    "one storage under many names": (
        b"\x80\x02" + TENSOR + b"q\x000}(" + b"".join(text(str(i)) + b"h\0" for i in range(2000)) + b"u.",
        "together more than 8 times the size of the file",
    ),
    "names of a megabyte": (dictionary(text("k" * 1_000_000), b"}" + text("w") + TENSOR + b"s"), "1000000 characters"),
    "text that is not UTF-8": (b"\x80\x02X\x02\0\0\0\xff\xfe.", "UnicodeDecodeError"),
    "an integer of 5,000 digits": (b"\x80\x02I" + b"1" * 5000 + b"\n.", "damaged"),
    "a huge size": (mapping(w=tensor(storage("0", 24).replace(number(24), b"\x8a\xff" + b"\x7f" * 255), 0, (2,), (1,))),
                    "has size an integer of 2039 bits"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["zip", "stream"])
@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_that_describes_much(case: str, kind: str, tmp_path: Path) -> None:
    program, message = PICKLES[case]
    if kind == "zip":
        path = write_zip(tmp_path / "a.bin", program, {"0": NUMBERS.tobytes()})
    else:
        path = write_stream(tmp_path / "a.bin", program, {"0": NUMBERS})
    with bounded(), pytest.raises(WeightsError) as error:
        read_checkpoint([path])
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert len(str(error.value)) < 1000


def test_tensors_may_share_a_storage(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.bin", mapping(a=TENSOR, b=TENSOR), {"0": NUMBERS.tobytes()})
    tensors = read_checkpoint([path]).tensors
    assert np.shares_memory(tensors["a"], tensors["b"])
    np.testing.assert_array_equal(tensors["b"], NUMBERS)


@pytest.mark.parametrize("member", ["data.pkl", "byteorder"])
def test_a_compressed_member_is_not_unpacked(member: str, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", mapping(w=TENSOR))
        archive.writestr("archive/data/0", NUMBERS.tobytes())
    with zipfile.ZipFile(path, "a" if member == "byteorder" else "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"archive/{member}", b"\0" * (200 << 20))
    with (
        bounded(memory=64 << 20),
        pytest.raises(WeightsError, match=rf"a\.bin: member 'archive/{member}' is compressed"),
    ):
        read_checkpoint([path])


def test_a_long_byteorder_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("archive/data.pkl", mapping(w=TENSOR))
        archive.writestr("archive/byteorder", b"l" * 1000)
    with pytest.raises(WeightsError, match=r"a\.bin: member 'archive/byteorder' has 1000 bytes; the maximum is 16"):
        read_checkpoint([tmp_path / "a.bin"])


def patched(path: Path, mark: bytes, at: int, value: bytes) -> Path:
    """The file with other bytes at a place behind the last occurrence of a mark."""
    data = bytearray(path.read_bytes())
    begin = data.rfind(mark) + at
    data[begin : begin + len(value)] = value
    path.write_bytes(data)
    return path


ARCHIVES: dict[str, tuple[Callable[[Path], Path], str]] = {
    # 0x14 and 0x18 are compressed and uncompressed size in the directory's entry, 18 and 22 in front of the member.
    "a member is longer in the directory": (
        lambda path: patched(path, b"PK\x01\x02", 24, struct.pack("<I", 7)),
        "the sizes of member 'archive/data/0' differ",
    ),
    "a member is longer in front of itself": (
        lambda path: patched(path, b"PK\x03\x04", 22, struct.pack("<I", 7)),
        "the sizes of member 'archive/data/0' differ",
    ),
    "the directory is longer than any": (
        lambda path: patched(path, b"PK\x05\x06", 12, struct.pack("<I", 1 << 24)),
        "its directory has more than",
    ),
    "a damaged pickle": (
        lambda path: patched(path, b"\x80\x02}(", 5, b"\x03"),
        "'archive/data.pkl' has a wrong checksum",
    ),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_whose_records_disagree(case: str, tmp_path: Path) -> None:
    change, message = ARCHIVES[case]
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", mapping(w=TENSOR))
        archive.writestr("archive/data/0", NUMBERS.tobytes())
    assert read_checkpoint([path]).tensors["w"].shape == (24,)
    with pytest.raises(WeightsError, match=message):
        read_checkpoint([change(path)])


def test_a_storage_longer_than_its_tensors_say(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.bin", mapping(w=TENSOR), {"0": NUMBERS.tobytes() + b"\0" * 4})
    with pytest.raises(WeightsError, match="storage '0' has 100 bytes, expected 24 elements"):
        read_checkpoint([path])


def test_two_members_with_one_name(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.bin", mapping(w=TENSOR), {"0": NUMBERS.tobytes()})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", NUMBERS[::-1].tobytes())
    with pytest.raises(WeightsError, match="two members of the same name"):
        read_checkpoint([path])


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "thousands of huge sizes": (
        lambda: json.dumps({"a": ENTRY | {"shape": [10**4000] * 5000}}).encode(),
        "'a' has 5000 axes",
    ),
    "a few huge sizes": (
        lambda: json.dumps({"a": ENTRY | {"shape": [10**4000] * 20}}).encode(),
        "'a' has shape .an integer of 13288 bits.* is too large",
    ),
    "huge offsets": (
        lambda: json.dumps({"a": ENTRY | {"data_offsets": [0, 10**4000]}}).encode(),
        "'a' has offsets .0, an integer of",
    ),
    "nothing of a huge shape": (
        lambda: json.dumps({"a": ENTRY | {"shape": [0, 1 << 62], "data_offsets": [0, 0]}}).encode(),
        "'a' has shape .*too large",
    ),
    "an integer of 5,000 digits": (
        lambda: b'{"a": ' + json.dumps(ENTRY).encode().replace(b"[2]", b"[" + b"1" * 5000 + b"]") + b"}",
        "header cannot be read: shape has an integer of 5000 digits",
    ),
    "names repeated 300,000 times": (
        lambda: b"{" + b",".join(b'"%d":0,"a%d":0' % (i, i) for i in range(150_000)) + b',"a3":1}',
        "header names 'a3' twice",
    ),
    "a million entries": (lambda: b"{" + b",".join(b'"%d":0' % i for i in range(1_000_000)) + b"}", "1000000 tensors"),
    "millions of values": (lambda: b"[" + b"[]," * 2_100_000 + b"0]", "header has more than 2000000 values"),
    "3,000 brackets": (lambda: b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}", "header is .*nested more than 64"),
    "100 brackets": (lambda: b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "header is nested more than 64"),
    "a name of a megabyte": (lambda: json.dumps({"a" * 1_000_000: ENTRY}).encode(), "has 1000000 characters"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_safetensors_header_that_claims_much(case: str, tmp_path: Path) -> None:
    header, message = HEADERS[case]
    path = write_raw(tmp_path / "a.safetensors", header(), b"\0" * 8)
    with bounded(), pytest.raises(WeightsError, match=f"(?s)a.safetensors: .*{message}") as error:
        read_checkpoint([path])
    assert len(str(error.value)) < 1000


EMPTY = b"\xc7\x0c\x01\x93\x91\x00\xa7float32\xc4\x00"  # an array of shape [0]
MSGPACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "50 MB of empty arrays": (
        lambda: b"\x81\xa1a\xdd" + struct.pack(">I", 1 << 24) + EMPTY.replace(b"\xc7\x0c", b"\xc7\x0d") * 3_300_000,
        "more than 500000 values",
    ),
    "50 MB of empty lists": (
        lambda: b"\x81\xa1a\xdd" + struct.pack(">I", 50_000_000) + b"\x90" * 50_000_000,
        "more than 500000 values",
    ),
    "a huge shape": (
        lambda: b"\x81\xa1a\xc7\x1e\x01\x93\x92" + (b"\xcf" + b"\xff" * 8) * 2 + b"\xa7float32\xc4\x00",
        "is too large",
    ),
}


@pytest.mark.parametrize("case", MSGPACKS)
def test_a_msgpack_that_claims_much(case: str, tmp_path: Path) -> None:
    make, message = MSGPACKS[case]
    path = tmp_path / "a.msgpack"
    path.write_bytes(make())
    with bounded(), pytest.raises(WeightsError, match=rf"a\.msgpack: .*{message}"):
        read_checkpoint([path])


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for data, message in {
        b"{": "is not JSON",
        b'{"a": "\xff"}': "is not JSON .*utf-8",
        b"[" * 3000 + b"]" * 3000: "nested more than 64",
        b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}": "nested more than 64",
        b'{"a": ' + b"1" * 5000 + b"}": "an integer of 5000 digits",
        b"[" + b"0," * 2_100_000 + b"0]": "more than 2000000 values",
        b" " * (MAX_JSON + 1): f"has more than {MAX_JSON} bytes",
        b"[]": "expected a JSON object, got list",
    }.items():
        path.write_bytes(data)
        with bounded(), pytest.raises(WeightsError, match=rf"config\.json: .*{message}"):
            read_json(path)


@pytest.mark.parametrize("file", ["config.json", "a.safetensors", "a.bin", "a.msgpack"])
def test_devices_and_pipes_are_not_waited_for(file: str, tmp_path: Path) -> None:
    path = tmp_path / file
    read = read_json if file == "config.json" else lambda path: read_checkpoint([path])
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir):
        make(path)
        with bounded(5), pytest.raises(WeightsError, match=rf"{path}: is not a regular file"):
            read(path)
        path.rmdir() if path.is_dir() else path.unlink()
