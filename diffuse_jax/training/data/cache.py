"""Arrays that are computed once from a data set, stored on disk, and read from there by every process.

A cache is a folder of ``.npy`` files whose name is a hash of everything that its content depends on. It gets that name
once it is complete; if anything differs, so does the name, and a new cache is computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from diffuse_jax.training.data.sources import Source
from diffuse_jax.training.data.transform import Example, Size, Transform
from diffuse_jax.writing import lock, naming, only_writer, write_all

Arrays = dict[str, np.ndarray]

CHUNK = 32
"""Number of rows that are computed at once."""

READERS = 8
"""Number of threads that read images for a cache."""


class Stored(Mapping[str, np.ndarray]):
    """The arrays of a cache, memory-mapped when they are first read; pickled as the name of the folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._names = sorted(path.stem for path in self.folder.glob("*.npy"))
        self._open: Arrays = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._open:
            if name not in self._names:
                raise KeyError(f"{self.folder} has no {name}; it has {self._names}")
            self._open[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_names": self._names, "_open": {}}

    def row(self, index: int) -> Arrays:
        """Row ``index`` of every array."""
        return {name: np.asarray(self[name][index]) for name in self}


def cached(path: str | Path, key: Mapping[str, Any], count: int, compute: Callable[[range], Arrays]) -> Stored:
    """Arrays ``[count, ...]`` from the folder ``PATH-HASH``, which is computed first if it does not exist.

    Processes that share the disk wait for the one that computes; if it is interrupted, nothing that it leaves behind is
    used. ``compute`` must not wait for other processes: a collective operation would never end.

    Args:
      path: path of the cache, such as ``OUTPUT/cache/latents``; a hash of ``key`` is appended.
      key: everything that the content depends on, serialisable as JSON: the data set, the size, the model.
      count: number of rows.
      compute: maps rows to arrays ``[len(rows), ...]``, with the same names, dtypes and shapes for all rows.

    Raises:
      ValueError: ``compute`` returned arrays of the wrong length, or of another dtype or shape than before.
      OSError: a file cannot be written, for example because the disk is full; the message names it.
      FileExistsError: the file system has no locks, and another process may be computing the same cache.
    """
    content = json.dumps({**key, "count": count}, sort_keys=True, indent=1)
    name = f"{Path(path).name}-{hashlib.sha256(content.encode()).hexdigest()[:20]}"
    target = Path(path).resolve().with_name(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as turn:
        lock(turn.fileno(), wait=True)  # one process computes, the others find the result
        if not target.is_dir():
            with only_writer(target) as part:
                with naming(part / "key.json"):
                    (part / "key.json").write_text(content)
                _fill(part, Path(path).name, count, compute)
                part.rename(target)
    return Stored(target)


def _fill(folder: Path, name: str, count: int, compute: Callable[[range], Arrays]) -> None:
    """Write the arrays row by row, so that a full disk is an error; with memory-mapped files it would be a SIGBUS."""
    files: dict[str, IO[bytes]] = {}
    first: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    with contextlib.ExitStack() as stack:
        for start in tqdm(
            range(0, count, CHUNK), desc=f"caching {name}", unit_scale=CHUNK, mininterval=5, disable=None
        ):
            rows = range(start, min(start + CHUNK, count))
            arrays = {key: np.asarray(value) for key, value in compute(rows).items()}
            for key, array in arrays.items():
                if len(array) != len(rows):
                    raise ValueError(f"cache {name}: {key} has {len(array)} rows where {len(rows)} were expected")
            kinds = {key: (array.dtype, array.shape[1:]) for key, array in arrays.items()}
            if start == 0:
                first = kinds
                for key, (dtype, shape) in first.items():
                    path = folder / f"{key}.npy"
                    with naming(path):
                        files[key] = stack.enter_context(path.open("wb", buffering=0))
                    write_all(path, files[key], _header(dtype, (count, *shape)))
            if kinds != first:
                raise ValueError(f"cache {name}: rows from {start} on are {kinds}, those before were {first}")
            for key, array in arrays.items():
                write_all(folder / f"{key}.npy", files[key], array.tobytes())


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The header of a ``.npy`` file."""
    file = io.BytesIO()
    head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, head)
    return file.getvalue()


def fingerprint_params(params: Any) -> str:
    """A hash of a tree of parameters: paths, dtypes, shapes and values."""
    import jax

    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class CachedImages:
    """Arrays computed from each image; ``cache(example)`` returns those of an example. Usable in data workers.

    Attributes:
      stored: one cache per size.
      bucket: index of the cache that contains each row of the source, int ``[N]``.
      row: index of the row within that cache, int ``[N]``.
    """

    stored: tuple[Stored, ...]
    bucket: np.ndarray
    row: np.ndarray

    def __call__(self, example: Example) -> Arrays:
        return self.stored[self.bucket[example.index]].row(int(self.row[example.index]))


def cache_images(
    folder: str | Path,
    name: str,
    key: Mapping[str, Any],
    source: Source,
    transform: Transform,
    encode: Callable[[list[Example]], Arrays],
    buckets: Sequence[tuple[Size, np.ndarray]] | None = None,
) -> CachedImages:
    """Encode one version of every image (its centre crop, not mirrored) and store the results.

    Args:
      folder: folder of the caches.
      name: name of this cache, such as "latents".
      key: values that identify the encoder, such as its :func:`fingerprint_params`.
      source: the data set.
      transform: how images are resized.
      encode: maps examples of the same size to arrays with one row per example, such as ``moments`` and ``time_ids``.
      buckets: result of :func:`~diffuse_jax.training.data.buckets.assign`, if buckets are used; each size gets a cache.
    """
    transform = dataclasses.replace(transform, pixels=True)
    groups = buckets or [((transform.crop_size or transform.resolution,) * 2, np.arange(len(source)))]
    identity = {"data": source.fingerprint, "interpolation": transform.interpolation, "side": transform.resolution}
    bucket, row, stored = np.zeros(len(source), np.int32), np.zeros(len(source), np.int64), []
    for number, (size, rows) in enumerate(groups):
        bucket[rows], row[rows] = number, np.arange(len(rows))
        compute = functools.partial(_encode_rows, source, transform, encode, rows, size if buckets else None)
        stored.append(cached(Path(folder) / name, {**key, **identity, "size": size}, len(rows), compute))
    return CachedImages(tuple(stored), bucket, row)


def _encode_rows(
    source: Source,
    transform: Transform,
    encode: Callable[[list[Example]], Arrays],
    rows: np.ndarray,
    size: Size | None,
    part: range,
) -> Arrays:
    fixed = lambda index: transform.fixed(source[int(index)], int(index), size)
    with ThreadPoolExecutor(READERS) as pool:
        return encode(list(pool.map(fixed, rows[part.start : part.stop])))


@dataclasses.dataclass(frozen=True)
class CachedCaptions:
    """Arrays computed from each caption; ``cache(example)`` returns those of the example's caption, or of "" if
    dropped.

    Attributes:
      stored: one row per caption of each row of the source, and a last one for "".
      first: index of the first caption of each row, then the index of "", int ``[N + 1]``.
    """

    stored: Stored
    first: np.ndarray

    def __call__(self, example: Example) -> Arrays:
        dropped = example.caption_index < 0
        return self.stored.row(int(self.first[-1] if dropped else self.first[example.index] + example.caption_index))


def cache_captions(
    folder: str | Path, name: str, key: Mapping[str, Any], source: Source, encode: Callable[[list[str]], Arrays]
) -> CachedCaptions:
    """Encode every caption of a data set, and the empty caption, and store the results.

    Args:
      folder: folder of the caches.
      name: name of this cache, such as "text".
      key: values that identify the encoder, such as its :func:`fingerprint_params`.
      source: the data set.
      encode: maps texts to arrays with one row per text.
    """
    data = {"data": source.fingerprint}
    count = lambda rows: {"captions": np.array([len(source[i].captions) for i in rows], np.int64)}
    counts = cached(Path(folder) / "captions", data, len(source), count)["captions"]
    first = np.concatenate([[0], np.cumsum(counts)])
    compute = lambda rows: encode([_caption(source, first, row) for row in rows])
    return CachedCaptions(cached(Path(folder) / name, {**key, **data}, int(first[-1]) + 1, compute), first)


def _caption(source: Source, first: np.ndarray, row: int) -> str:
    """The caption of a row of the cache; "" for the last row."""
    if row == first[-1]:
        return ""
    index = int(np.searchsorted(first, row, side="right")) - 1
    return source[index].captions[row - int(first[index])]
