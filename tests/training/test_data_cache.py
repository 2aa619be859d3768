"""What is computed once from a data set, and read from disk afterwards."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.data import (
    Example,
    FolderSource,
    Transform,
    batches_from,
    buckets_from,
    cache_captions,
    cache_images,
    cached,
    fingerprint_params,
    source_from,
    transform_from,
)
from diffuse_jax.training.data.cache import CachedImages
from tests.disk import disk_of

from .data_sets import flags, image_folder, per_device


def squares(rows: range) -> dict[str, np.ndarray]:
    return {"square": np.arange(rows.start, rows.stop) ** 2, "pair": np.stack([rows, rows], 1).astype(np.float16)}


def test_a_cache_is_computed_once_and_mapped_from_disk(tmp_path: Path) -> None:
    asked: list[range] = []
    compute = lambda rows: asked.append(rows) or squares(rows)
    for _ in range(2):
        stored = cached(tmp_path / "a", {"model": 1}, 100, compute)
        np.testing.assert_array_equal(stored["square"], np.arange(100) ** 2)
        assert stored["pair"].dtype == np.float16
        assert isinstance(stored["pair"], np.memmap)
    assert [i for rows in asked for i in rows] == list(range(100))
    assert set(stored) == {"square", "pair"}
    with pytest.raises(KeyError, match=r"has no cube; it has \['pair', 'square'\]"):
        stored["cube"]


def test_another_key_is_another_cache(tmp_path: Path) -> None:
    one = cached(tmp_path / "a", {"model": 1}, 5, squares)
    other = cached(tmp_path / "a", {"model": 2}, 5, lambda rows: {"square": np.zeros(len(rows))})
    assert one["square"][4] == 16
    assert other["square"][4] == 0
    assert len(cached(tmp_path / "a", {"model": 1}, 6, squares)["square"]) == 6


def test_an_interrupted_cache_is_not_used(tmp_path: Path) -> None:
    def interrupted(rows: range) -> dict[str, np.ndarray]:
        if rows.start > 0:
            raise KeyboardInterrupt
        return {"square": np.full(len(rows), -1)}

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "a", {}, 100, interrupted)
    np.testing.assert_array_equal(cached(tmp_path / "a", {}, 100, squares)["square"], np.arange(100) ** 2)
    assert not list(tmp_path.glob(".*"))


def test_rows_that_are_missing_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cache a: x has 3 rows where 5 were expected"):
        cached(tmp_path / "a", {}, 5, lambda rows: {"x": np.zeros(3)})


def test_rows_of_another_kind_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cache a: rows from 32 on are .*float16.*, those before were .*float32"):
        cached(
            tmp_path / "a", {}, 40, lambda rows: {"x": np.zeros(len(rows), np.float16 if rows.start else np.float32)}
        )


def test_files_grow_with_what_they_hold(tmp_path: Path) -> None:
    """A file that is long at first has holes, and filling one on a full disk kills the process (SIGBUS)."""

    def compute(rows: range) -> dict[str, np.ndarray]:
        sizes = [path.stat().st_size for path in tmp_path.glob(".a-*.partial/*.npy")]
        assert len(sizes) == (rows.start > 0)
        assert all(size <= 1024 * rows.start + 128 for size in sizes)
        return {"x": np.full((len(rows), 256), rows.start, np.float32)}

    stored = cached(tmp_path / "a", {}, 100, compute)
    np.testing.assert_array_equal(stored["x"][:, 0], np.arange(100) // 32 * 32)


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    numbers = lambda rows: {"x": np.zeros((len(rows), 8), np.float32)}
    with disk_of(4000), pytest.raises(OSError, match=r"File too large: '.*x\.npy'"):
        cached(tmp_path / "latents", {}, 200, numbers)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert len(cached(tmp_path / "latents", {}, 200, numbers)["x"]) == 200


def slow(folder: Path, started: list[int]) -> None:
    def compute(rows: range) -> dict[str, np.ndarray]:
        (folder / f"started-{time.monotonic_ns()}").touch()
        time.sleep(0.3)
        return squares(rows)

    assert cached(folder / "a", {}, 5, compute)["square"][4] == 16


def test_processes_wait_for_the_one_that_computes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=slow, args=(tmp_path, [])) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("started-*"))) == 1


def test_workers_get_the_name_of_the_folder(tmp_path: Path) -> None:
    stored = cached(tmp_path / "a", {}, 10_000, squares)
    assert stored["square"][3] == 9
    sent = pickle.dumps(stored)
    assert len(sent) < 500
    np.testing.assert_array_equal(pickle.loads(sent)["square"], stored["square"])


def test_parameters_have_fingerprints() -> None:
    params = {"a": {"kernel": np.ones((2, 3), np.float32)}, "b": np.zeros(4, np.float16)}
    same = jax.tree.map(jax.numpy.asarray, params)
    changed = {**params, "b": np.array([0, 0, 0, 1], np.float16)}
    assert fingerprint_params(params) == fingerprint_params(same)
    assert len({fingerprint_params(tree) for tree in (params, changed, {"c": params["b"], "a": params["a"]})}) == 3


def mean(examples: list[Example]) -> dict[str, np.ndarray]:
    """A stand-in for an autoencoder: needs images of the same size."""
    pixels = np.stack([np.asarray(example.pixels) for example in examples])
    return {"moments": pixels[:, ::4, ::4].mean(-1), "size": np.array([e.original_size for e in examples])}


def from_cache(cache: CachedImages, example: Example) -> dict[str, np.ndarray]:
    assert example.pixels is None
    return cache(example) | {"index": np.int64(example.index)}


@pytest.mark.parametrize("buckets", [[], ["--aspect_ratio_buckets", "--bucket_step", "4"]])
def test_images_are_encoded_once_and_not_read_again(tmp_path: Path, buckets: list[str]) -> None:
    import functools

    folder = image_folder(tmp_path / "data", 12, [(30, 20), (20, 30), (20, 20)])
    line = ["--train_data_dir", str(folder), "--resolution", "16", "--data_cache_dir", str(tmp_path), "--cache_latents"]
    data = flags(*line, *buckets)
    source = source_from(data)
    groups = buckets_from(data, source)
    folder_of_caches = data.caches.data_cache_dir
    cache = cache_images(folder_of_caches, "latents", {}, source, transform_from(data), mean, groups)
    for i in range(12):
        (folder / f"{i}.png").unlink()
    mesh = make_mesh(devices=jax.devices()[:1])
    finish = functools.partial(from_cache, pickle.loads(pickle.dumps(cache)))
    batches = batches_from(data, per_device(), mesh, finish, source=source, pixels=False)
    shapes = set()
    for _ in range(6):
        batch = next(batches)
        shapes.add(batch["moments"].shape)
        assert (batch["moments"][:, 0, 0] == batch["index"]).all()
        assert batch["size"].tolist() == [[[30, 20], [20, 30], [20, 20]][i % 3] for i in batch["index"]]
    assert shapes == ({(2, 5, 3), (2, 3, 5), (2, 4, 4)} if buckets else {(2, 4, 4)})


def test_captions_are_encoded_once(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, 3)
    texts = ['"1"', '["22", "333"]', '"4444"']
    lines = [f'{{"file_name": "{i}.png", "text": {text}}}' for i, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    source, encoded = FolderSource(folder), []
    length = lambda texts: encoded.extend(texts) or {"length": np.array([len(text) for text in texts])}
    for _ in range(2):
        cache = cache_captions(tmp_path, "text", {"encoder": 1}, source, length)
    assert encoded == ["1", "22", "333", "4444", ""]
    transform = Transform(8, empty_share=0.3, pixels=False)
    examples = [transform(source[i % 3], i % 3, i) for i in range(60)]
    assert [int(cache(example)["length"]) for example in examples] == [len(example.caption) for example in examples]
    assert {example.caption for example in examples} == {"", "1", "22", "333", "4444"}
