"""The reader of PyTorch's files: strides, shared storages, and files that ask for more than tensors."""

from __future__ import annotations

import collections
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from diffuse_jax.weights import WeightsError
from diffuse_jax.weights.torch_file import read_torch, read_torch_object
from diffuse_jax.weights.torch_writer import write_torch
from tests.weights.torch_files import (
    OBJECT_END,
    many,
    mapping,
    name,
    number,
    storage,
    tensor,
    text,
    write_stream,
    write_zip,
)

NUMBERS = np.arange(24, dtype=np.float32)
WINDOWS = {
    "plain": (0, (4, 6), (6, 1), NUMBERS.reshape(4, 6)),
    "transposed": (0, (6, 4), (1, 6), NUMBERS.reshape(4, 6).T),
    "every second": (1, (3,), (2,), NUMBERS[1:7:2]),
    "expanded": (5, (2, 3), (0, 0), np.full((2, 3), 5, np.float32)),
    "scalar": (7, (), (), np.float32(7)),
    "empty": (0, (0, 3), (3, 1), np.zeros((0, 3), np.float32)),
}
PROGRAM = mapping(**{key: tensor(storage("0", 24), *window[:3]) for key, window in WINDOWS.items()})


def zipped(folder: Path, program: bytes = PROGRAM, data: bytes = NUMBERS.tobytes()) -> Path:
    return write_zip(folder / "a.bin", program, {"0": data})


@pytest.mark.parametrize("kind", ["zip", "stream"])
def test_windows_into_one_storage(kind: str, tmp_path: Path) -> None:
    stream = kind == "stream"
    path = write_stream(tmp_path / "a.pt", PROGRAM, {"0": NUMBERS}) if stream else zipped(tmp_path)
    read = read_torch(path)
    assert read.keys() == WINDOWS.keys()
    for key, (_, _, _, expected) in WINDOWS.items():
        assert read[key].shape == np.shape(expected)
        np.testing.assert_array_equal(read[key], expected)


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    read = read_torch(zipped(tmp_path))
    assert np.shares_memory(read["plain"], read["transposed"])
    with pytest.raises(ValueError, match="read-only"):
        read["plain"][0, 0] = 1


def test_state_dicts_are_unwrapped_and_numbers_left_out(tmp_path: Path) -> None:
    inner = mapping(w=tensor(storage("0", 24), 0, (2,), (1,)))[2:-1]
    program = b"\x80\x02}(" + text("state_dict") + inner + text("global_step") + number(875000) + b"u."
    assert list(read_torch(zipped(tmp_path, program))) == ["w"]
    assert read_torch_object(tmp_path / "a.bin")["global_step"] == 875000


def test_nested_dicts_join_their_names(tmp_path: Path) -> None:
    inner = mapping(w=tensor(storage("0", 24), 0, (2,), (1,)))[2:-1]
    assert list(read_torch(zipped(tmp_path, mapping(model=inner)))) == ["model.w"]


class Reduces:
    """Pickles as a call of whatever it is given."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


HOSTILE = {
    "a command": (pickle.dumps({"w": Reduces(os.system, ("touch owned",))}, 2), "the global posix.system"),
    "a command, newer opcodes": (
        pickle.dumps({"w": Reduces(os.system, ("touch owned",))}, 4),
        "the global posix.system",
    ),
    "eval": (pickle.dumps(Reduces(eval, ("1",)), 2), "the global __builtin__.eval"),
    "an attribute of builtins": (mapping(w=name("builtins", "getattr")), "the global builtins.getattr"),
    "a class": (pickle.dumps({"w": collections.Counter("a")}, 2), "the global collections.Counter"),
    "code inside torch": (mapping(w=name("torch.storage", "_load_from_bytes")), "torch.storage._load_from_bytes"),
    "a dotted name": (mapping(w=name("torch._utils", "_rebuild_tensor_v2.__globals__")), "__globals__"),
    "a callback": (
        mapping(w=name("pytorch_lightning.callbacks", "Checkpoint") + b")R"),  # its name alone is only text
        "a call of pytorch_lightning.callbacks.Checkpoint",
    ),
    "an instance": (b"(ios\nsystem\n.", "the pickle instruction INST"),
    "an object": (b"(cos\nsystem\no.", "the global os.system"),
    "an extension": (b"\x82\x01.", "the pickle instruction EXT1"),
    "calling a number": (mapping(w=number(3) + b")R"), "a call of int"),
    "attributes on a list": (b"]}b.", "attributes set on list"),
    "items into a name": (name("torch", "Size") + text("a") + number(1) + b"s.", "items put into Name"),
    "a foreign reference": (mapping(w=text("file:///etc/passwd") + b"Q"), "which is not a storage"),
    "no storage": (mapping(w=tensor(number(3), 0, (2,), (1,))), "invalid storage or dtype"),
    "too few arguments": (mapping(w=name("torch._utils", "_rebuild_tensor_v2") + b")R"), "missing"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_that_asks_for_more_is_refused_by_name(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program, message = HOSTILE[kind]
    for path in (zipped(tmp_path, program), write_stream(tmp_path / "b.pt", program, {"0": NUMBERS})):
        with pytest.raises(WeightsError) as error:
            read_torch(path)
        assert str(path) in str(error.value)
        assert message in str(error.value)
    assert not (tmp_path / "owned").exists()


WINDOWS_OUTSIDE = {
    "past the end": (20, (5,), (1,)),
    "wide strides": (0, (3, 3), (12, 1)),
    "before the beginning": (-1, (2,), (1,)),
    "negative strides": (5, (2,), (-1,)),
    "negative shape": (0, (-2,), (1,)),
    "more axes than strides": (0, (2, 2), (1,)),
}


@pytest.mark.parametrize("kind", WINDOWS_OUTSIDE)
def test_a_window_outside_its_storage_is_refused(kind: str, tmp_path: Path) -> None:
    program = mapping(w=tensor(storage("0", 24), *WINDOWS_OUTSIDE[kind]))
    with pytest.raises(WeightsError, match=r"a\.bin: refused: its pickle contains a tensor"):
        read_torch(zipped(tmp_path, program))


def test_a_storage_that_is_shorter_than_announced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"storage '0' has 92 bytes, expected 24 elements"):
        read_torch(zipped(tmp_path, data=NUMBERS.tobytes()[:-4]))


def test_a_storage_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="storage '1' is not in the file"):
        read_torch(zipped(tmp_path, mapping(w=tensor(storage("1", 24), 0, (2,), (1,)))))


def test_lists_of_lists_without_end_are_refused(tmp_path: Path) -> None:
    # Each line doubles the list before it, so a kilobyte describes 2**60 items.
    bomb = b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c0" % (i, i, i + 1) for i in range(60)) + b"h\x3c."
    with pytest.raises(WeightsError, match="refused: containers"):
        read_torch(zipped(tmp_path, bomb))
    ring = b"\x80\x02]q\x00h\x00a."  # a list inside itself
    with pytest.raises(WeightsError, match="refused: containers"):
        read_torch(zipped(tmp_path, ring))


@pytest.mark.parametrize("kind", ["zip", "stream"])
def test_every_truncation_is_noticed(kind: str, tmp_path: Path) -> None:
    program = mapping(w=tensor(storage("0", 24), 0, (24,), (1,)))
    stream = kind == "stream"
    whole = write_stream(tmp_path / "a.pt", program, {"0": NUMBERS}) if stream else zipped(tmp_path, program)
    data = whole.read_bytes()
    for size in range(0, len(data), 7):
        (tmp_path / "cut.bin").write_bytes(data[:size])
        with pytest.raises(WeightsError, match=r"cut\.bin"):
            read_torch(tmp_path / "cut.bin")


def test_other_files_are_refused(tmp_path: Path) -> None:
    for data in (b"<html>not found</html>", pickle.dumps([1, 2], 2), b"\x80", b"version https://git-lfs"):
        (tmp_path / "a.bin").write_bytes(data)
        with pytest.raises(WeightsError, match=r"a\.bin"):
            read_torch(tmp_path / "a.bin")
    write_zip(tmp_path / "compressed.bin", PROGRAM, {"0": NUMBERS.tobytes()}, zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match=r"'archive/byteorder' is compressed"):
        read_torch(tmp_path / "compressed.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin", "w") as archive:
        archive.writestr("hello", "world")
    with pytest.raises(WeightsError, match=r"not written by torch\.save"):
        read_torch(tmp_path / "plain.bin")
    with pytest.raises(WeightsError, match="contains no tensors"):
        read_torch(zipped(tmp_path, b"\x80\x02}" + OBJECT_END))
    with pytest.raises(WeightsError, match="a single tensor without a name"):
        read_torch(zipped(tmp_path, b"\x80\x02" + tensor(storage("0", 24), 0, (2,), (1,)) + OBJECT_END))


def test_sizes_and_plain_values_are_kept(tmp_path: Path) -> None:
    size = name("torch", "Size") + many(many(number(2), number(3))) + b"R"
    values = read_torch_object(zipped(tmp_path, mapping(size=size, kind=name("torch", "float16"), note=text("hello"))))
    assert values == {"size": (2, 3), "kind": np.dtype("float16"), "note": "hello"}


def test_a_file_that_is_written_is_read_here_and_by_pytorch(tmp_path: Path, rng: np.random.Generator) -> None:
    wanted = {
        "a.b": rng.standard_normal((3, 4, 5)).astype(np.float32),
        "half": rng.standard_normal(7).astype(np.float16),
        "brain": rng.standard_normal((2, 2)).astype(ml_dtypes.bfloat16),
        "scalar": np.float32(3).reshape(()),
        "none": np.zeros((0, 3), np.float32),
    }
    specs = {name: (array.dtype, array.shape) for name, array in wanted.items()}
    write_torch(tmp_path / "a.bin", specs, iter(wanted.values()))
    read = read_torch(tmp_path / "a.bin")
    assert [*read] == [*wanted]
    for name_, array in wanted.items():
        assert (read[name_].dtype, read[name_].shape) == specs[name_]
        np.testing.assert_array_equal(read[name_], array)
    with pytest.raises(WeightsError, match=r"b\.bin: 'x' has dtype int64, which is not written as \.bin"):
        write_torch(tmp_path / "b.bin", {"x": (np.dtype(np.int64), (1,))}, iter([np.zeros(1, np.int64)]))
    assert not (tmp_path / "b.bin").exists()
    torch = pytest.importorskip("torch")
    for options in ({}, {"mmap": True}):
        loaded = torch.load(tmp_path / "a.bin", weights_only=True, **options)
        assert [*loaded] == [*wanted]
        for name_, array in wanted.items():
            np.testing.assert_array_equal(loaded[name_].float().numpy(), array.astype(np.float32))
            assert tuple(loaded[name_].shape) == array.shape
