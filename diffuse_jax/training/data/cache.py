"""Arrays that are computed once from a data set, kept on disk, and read from there by every process.

A cache is a folder of ``.npy`` files whose name is made of everything that its content depends on. It appears under
that name when it is whole; where anything differs, the name does too, and a new one is computed.
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
"""Rows that are computed at once."""

READERS = 8
"""Threads that read pictures for a cache."""


class Stored(Mapping[str, np.ndarray]):
    """The arrays of a cache, mapped into memory when they are first read; pickles as the name of its folder."""

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
    """Arrays ``[count, ...]`` from the folder ``PATH-...``, computed there first if they are not there yet.

    Processes that share the disk wait for the one that computes; an interrupted one leaves nothing behind that would be
    used. ``compute`` must not wait for other processes itself: a collective operation would never end.

    Args:
      path: name of the cache, such as ``OUTPUT/cache/latents``; what ``key`` says is added to it.
      key: all that the content depends on, as JSON can hold it: the data set, the size, the model.
      count: rows.
      compute: rows -> arrays ``[len(rows), ...]``, of the same names, dtypes and shapes for all rows.

    Raises:
      ValueError: ``compute`` returned arrays of another length, or of another kind than for the rows before.
      OSError: a file cannot be written, such as on a full disk; the text names it.
      FileExistsError: the file system has no locks, and another process may be computing the same.
    """
    content = json.dumps({**key, "count": count}, sort_keys=True, indent=1)
    name = f"{Path(path).name}-{hashlib.sha256(content.encode()).hexdigest()[:20]}"
    target = Path(path).resolve().with_name(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as turn:
        lock(turn.fileno(), wait=True)  # one process computes, the others find what it computed
        if not target.is_dir():
            with only_writer(target) as part:
                with naming(part / "key.json"):
                    (part / "key.json").write_text(content)
                _fill(part, Path(path).name, count, compute)
                part.rename(target)
    return Stored(target)


def _fill(folder: Path, name: str, count: int, compute: Callable[[range], Arrays]) -> None:
    """Write the arrays row after row: a full disk is an error then; with mapped files it would be a SIGBUS."""
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
                    raise ValueError(f"cache {name}: {key} has {len(array)} rows where {len(rows)} were wanted")
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
    """The head of a ``.npy`` file of so many rows, which are to follow."""
    file = io.BytesIO()
    head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, head)
    return file.getvalue()


def fingerprint_params(params: Any) -> str:
    """A name for a tree of parameters: its paths, dtypes, shapes and every number."""
    import jax

    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class CachedPictures:
    """What was computed from each picture; ``cache(example)`` is its row. For a ``finish`` that runs in workers.

    Attributes:
      stored: a cache for each size.
      bucket: which of them a row of the source is in, int ``[N]``.
      row: and where, int ``[N]``.
    """

    stored: tuple[Stored, ...]
    bucket: np.ndarray
    row: np.ndarray

    def __call__(self, example: Example) -> Arrays:
        return self.stored[self.bucket[example.index]].row(int(self.row[example.index]))


def cache_pictures(
    folder: str | Path,
    name: str,
    key: Mapping[str, Any],
    source: Source,
    transform: Transform,
    encode: Callable[[list[Example]], Arrays],
    buckets: Sequence[tuple[Size, np.ndarray]] | None = None,
) -> CachedPictures:
    """One version of every picture (its middle, not mirrored), encoded and stored.

    Args:
      folder: where caches lie.
      name: what they are, such as "latents".
      key: what identifies the encoder, such as :func:`fingerprint_params` of it.
      source: the data set.
      transform: how its pictures are resized.
      encode: examples of one size -> arrays with a row for each, such as ``moments`` and ``time_ids``.
      buckets: of :func:`~diffuse_jax.training.data.buckets.assign`, if there are buckets; a cache for each size.
    """
    transform = dataclasses.replace(transform, pixels=True)
    groups = buckets or [((transform.crop_size or transform.resolution,) * 2, np.arange(len(source)))]
    identity = {"data": source.fingerprint, "interpolation": transform.interpolation, "side": transform.resolution}
    bucket, row, stored = np.zeros(len(source), np.int32), np.zeros(len(source), np.int64), []
    for number, (size, rows) in enumerate(groups):
        bucket[rows], row[rows] = number, np.arange(len(rows))
        compute = functools.partial(_encode_rows, source, transform, encode, rows, size if buckets else None)
        stored.append(cached(Path(folder) / name, {**key, **identity, "size": size}, len(rows), compute))
    return CachedPictures(tuple(stored), bucket, row)


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
    """What was computed from each caption; ``cache(example)`` is that of the caption drawn, or of "".

    Attributes:
      stored: a row for each caption of each row of the source, and one for "".
      first: where the captions of a row begin, and last the row of "", int ``[N + 1]``.
    """

    stored: Stored
    first: np.ndarray

    def __call__(self, example: Example) -> Arrays:
        dropped = example.caption_index < 0
        return self.stored.row(int(self.first[-1] if dropped else self.first[example.index] + example.caption_index))


def cache_captions(
    folder: str | Path, name: str, key: Mapping[str, Any], source: Source, encode: Callable[[list[str]], Arrays]
) -> CachedCaptions:
    """Every caption of a data set, and the empty one, encoded and stored.

    Args:
      folder: where caches lie.
      name: what they are, such as "text".
      key: what identifies the encoder, such as :func:`fingerprint_params` of it.
      source: the data set.
      encode: texts -> arrays with a row for each.
    """
    counted = {"data": source.fingerprint}
    numbers = lambda rows: {"captions": np.array([len(source[i].captions) for i in rows], np.int64)}
    counts = cached(Path(folder) / "captions", counted, len(source), numbers)["captions"]
    first = np.concatenate([[0], np.cumsum(counts)])
    compute = lambda rows: encode([_caption(source, first, row) for row in rows])
    return CachedCaptions(cached(Path(folder) / name, {**key, **counted}, int(first[-1]) + 1, compute), first)


def _caption(source: Source, first: np.ndarray, row: int) -> str:
    """The caption that belongs into a row of the cache; "" into the last."""
    if row == first[-1]:
        return ""
    index = int(np.searchsorted(first, row, side="right")) - 1
    return source[index].captions[row - int(first[index])]
