"""The reader and writer of Flax's files, against Flax itself and against damaged files."""

from __future__ import annotations

from pathlib import Path

import flax.serialization
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest

from diffuse_jax.weights import WeightsError, names
from diffuse_jax.weights import msgpack as ours
from diffuse_jax.weights.msgpack import read_msgpack, write_msgpack
from tests.weights.tiny import same_bits


def tree(rng: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
    return {
        "conv_in": {
            "kernel": rng.standard_normal((3, 3, 2, 300)).astype(np.float32),
            "bias": np.zeros(300, np.float16),
        },
        "a" * 40: {
            "embedding": rng.standard_normal((5, 7)).astype(ml_dtypes.bfloat16),
            "count": np.int32(3).reshape(()),
        },
        **{f"layers_{i}": {"scale": np.full((2,), i, np.float32)} for i in range(20)},
    }


def test_flax_files_are_read(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(flax.serialization.to_bytes(tree(rng)))
    read = read_msgpack(path)
    expected = {"/".join(key): array for key, array in names.flatten(tree(np.random.default_rng(0))).items()}
    assert read.keys() == expected.keys()
    assert all(same_bits(read[key], array) for key, array in expected.items())


def write(path: Path, arrays: dict[tuple[str, ...], np.ndarray]) -> None:
    write_msgpack(path, {key: (array.dtype, array.shape) for key, array in arrays.items()}, arrays.__getitem__)


def test_flax_reads_what_is_written(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = names.flatten(tree(rng))
    write(tmp_path / "a.msgpack", arrays)
    theirs = names.flatten(flax.serialization.msgpack_restore((tmp_path / "a.msgpack").read_bytes()))
    assert theirs.keys() == arrays.keys()
    assert all(same_bits(theirs[key], array) for key, array in arrays.items())


def test_arrays_in_chunks(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 100)
    monkeypatch.setattr(ours, "CHUNK", 100)
    kernel = rng.standard_normal((9, 11)).astype(np.float32)
    (tmp_path / "theirs.msgpack").write_bytes(flax.serialization.to_bytes({"dense": {"kernel": kernel}}))
    write(tmp_path / "ours.msgpack", {("dense", "kernel"): kernel})
    for name in ("theirs", "ours"):
        assert same_bits(read_msgpack(tmp_path / f"{name}.msgpack")["dense/kernel"], kernel)
    restored = flax.serialization.msgpack_restore((tmp_path / "ours.msgpack").read_bytes())
    assert same_bits(restored["dense"]["kernel"], kernel)


def extension(shape: object, name: object, data: bytes, code: int = 1) -> bytes:
    return msgpack.packb({"w": msgpack.ExtType(code, msgpack.packb((shape, name, data)))})


DAMAGED = {
    "shape larger than its bytes": (extension((3,), "float32", b"\0" * 8), "does not fit its shape"),
    "negative shape": (extension((-1,), "float32", b"\0" * 8), "shape [-1]; sizes must be non-negative integers"),
    "unknown dtype": (extension((2,), "object", b"\0" * 8), "does not fit its shape or dtype"),
    "no array": (msgpack.packb({"w": msgpack.ExtType(1, msgpack.packb(3))}), "does not fit"),
    "other extension": (extension((2,), "float32", b"\0" * 8, code=5), "extension type 5"),
    "a number for an array": (msgpack.packb({"block": {"w": 3}}), "'block/w' is a int"),
    "not a map": (msgpack.packb([1, 2]), "not a Flax file"),
    "numbers as names": (msgpack.packb({1: {}}), "a map key is not a string"),
    "twice": (b"\x82\xa1a\x80\xa1a\x80", "names 'a' twice"),
    "more behind it": (msgpack.packb({}) + b"\0", "1 bytes follow"),
    "undefined byte": (b"\xc1", "0xc1"),
    "nested without end": (b"\x81\xa1a" * 200, "nested more than"),
    "a text that is none": (b"\x81\xa2\xff\xfe\x80", "is not text"),
    "chunks that do not fit": (
        msgpack.packb({"w": {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {}}}),
        "'w' is a chunked array",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_refused(kind: str, tmp_path: Path) -> None:
    data, message = DAMAGED[kind]
    (tmp_path / "a.msgpack").write_bytes(data)
    with pytest.raises(WeightsError) as error:
        read_msgpack(tmp_path / "a.msgpack")
    assert "a.msgpack" in str(error.value)
    assert message in str(error.value)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    data = flax.serialization.to_bytes({"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}})
    for size in range(len(data)):
        (tmp_path / "cut.msgpack").write_bytes(data[:size])
        with pytest.raises(WeightsError, match=r"cut\.msgpack"):
            read_msgpack(tmp_path / "cut.msgpack")
