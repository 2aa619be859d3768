"""The safetensors reader and writer: every dtype, the reference implementation's files, and false headers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from diffuse_jax.weights import WeightsError, read_checkpoint
from diffuse_jax.weights.safetensors import DTYPES, MAX_HEADER, read_metadata, read_safetensors, write_safetensors
from tests.weights.tiny import same_bits, write_raw


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    write_safetensors(path, {key: (a.dtype, a.shape) for key, a in tensors.items()}, tensors.values())
    return path


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_round_trips(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    bits = rng.integers(0, 2 if name == "BOOL" else 256, 48, np.uint8)
    array = bits.view(DTYPES[name]).reshape(2, -1)
    empty, scalar = np.zeros((0, 3), array.dtype), array[0, 0].reshape(())
    read = read_safetensors(write(tmp_path / "a.safetensors", {"a": array, "empty": empty, "scalar": scalar}))
    assert same_bits(read["a"], array)
    assert same_bits(read["empty"], empty)
    assert same_bits(read["scalar"], scalar)


def test_the_reference_implementation_reads_and_writes_the_same(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = {f"t{i}": rng.standard_normal((3, i)).astype(np.float32) for i in range(4)}
    ours = safetensors.numpy.load_file(write(tmp_path / "ours.safetensors", tensors))
    safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt", "made": "by hand"})
    theirs = read_safetensors(tmp_path / "theirs.safetensors")
    for key, array in tensors.items():
        assert same_bits(ours[key], array)
        assert same_bits(theirs[key], array)
    assert read_metadata(tmp_path / "ours.safetensors") == {"format": "pt"}
    assert read_metadata(tmp_path / "theirs.safetensors") == {"format": "pt", "made": "by hand"}


def test_tensors_are_read_only_views_of_the_file(tmp_path: Path) -> None:
    read = read_safetensors(write(tmp_path / "a.safetensors", {"a": np.ones(8, np.float32)}))
    with pytest.raises(ValueError, match="read-only"):
        read["a"][0] = 2


FLOATS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "shape larger than its bytes": ({"a": FLOATS | {"shape": [3]}}, 8, "'a'.*needs 12 bytes, but its offsets span 8"),
    "beyond the end": ({"a": FLOATS | {"shape": [4], "data_offsets": [0, 16]}}, 8, "truncated: 'a' ends at byte"),
    "overlap": ({"a": FLOATS, "b": FLOATS | {"data_offsets": [4, 12]}}, 12, "'b' begins at byte 4.*expected 8"),
    "hole": ({"a": FLOATS, "b": FLOATS | {"data_offsets": [12, 20]}}, 20, "'b' begins at byte 12.*expected 8"),
    "bytes of nobody": ({"a": FLOATS}, 9, "1 bytes after the last tensor"),
    "negative": ({"a": FLOATS | {"shape": [-2], "data_offsets": [0, -8]}}, 8, "'a'.*non-negative integers"),
    "sizes that are no numbers": ({"a": FLOATS | {"shape": [True, 2]}}, 8, "'a'.*non-negative integers"),
    "overflowing product": ({"a": FLOATS | {"shape": [2**32, 2**32]}}, 8, "'a'.*too large"),
    "unknown dtype": ({"a": FLOATS | {"dtype": "F31"}}, 8, "'a' has dtype 'F31'"),
    "unhashable dtype": ({"a": FLOATS | {"dtype": ["F32"]}}, 8, "'a' has dtype"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "'a' lacks"),
    "entry is a number": ({"a": 3}, 8, "'a' lacks"),
    "not an object": ([1, 2], 8, "not a JSON object"),
    "not JSON": (b"{a: 1}", 8, "not JSON"),
    "not text": (b"\xff\xfe", 8, "not JSON"),
    "nested without end": (b"[" * 100_000, 8, "nested more than"),
    "twice": (b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": 1}', 8, "names 'a' twice"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_false_header_is_refused_with_file_and_key(lie: str, tmp_path: Path) -> None:
    header, size, message = LIES[lie]
    path = write_raw(tmp_path / "liar.safetensors", header, b"\0" * size)
    with pytest.raises(WeightsError, match=f"(?s)liar.safetensors: .*{message}"):
        read_safetensors(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, MAX_HEADER + 1, 1000])
def test_a_header_longer_than_the_file_is_refused_before_it_is_read(length: int, tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(WeightsError, match="truncated or not safetensors"):
        read_safetensors(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.safetensors", {"a": np.ones(3, np.float32), "b": np.ones(2, np.float16)})
    data = whole.read_bytes()
    for size in range(len(data)):
        (tmp_path / "cut.safetensors").write_bytes(data[:size])
        with pytest.raises(WeightsError, match=r"cut\.safetensors"):
            read_safetensors(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".msgpack"])
def test_a_pointer_of_git_lfs_is_named(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3438167534\n")
    with pytest.raises(WeightsError, match="is a Git LFS pointer"):
        read_checkpoint([file])


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": np.ones(3, np.float32)})
    before = path.read_bytes()

    def arrays() -> object:
        yield np.zeros(3, np.float32)
        raise KeyboardInterrupt

    spec = (np.dtype("float32"), (3,))
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, {"a": spec, "b": spec}, arrays())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_the_writer_refuses_what_the_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"'z' has dtype complex64"):
        write(tmp_path / "a.safetensors", {"z": np.zeros(2, np.complex64)})
    with pytest.raises(WeightsError, match=r"'a' was declared as float32\[3\] but is float32\[2\]"):
        write_safetensors(tmp_path / "a.safetensors", {"a": (np.dtype("float32"), (3,))}, [np.zeros(2, np.float32)])
    assert os.listdir(tmp_path) == []


def test_the_header_is_plain_json_and_tensors_are_aligned(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"odd name": np.ones(3, np.float32)})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length])["odd name"] == {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
