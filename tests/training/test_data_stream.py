"""Data sets that are read from front to back: every row once per epoch, and restored bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.data import DataSettings, batches_from
from diffuse_jax.training.data.opening import stream_from
from diffuse_jax.training.data.stream import Records, StreamLoader
from diffuse_jax.training.data.transform import Transform

from .data_sets import finish, flags, per_device, table


def write_files(folder: Path, count: int) -> str:
    for part in range(count):
        table(10, first=10 * part).to_parquet(folder / f"train-{part:05d}-of-{count:05d}.parquet")
    return str(folder)


@pytest.fixture
def parquet(tmp_path: Path) -> str:
    """Four files of ten rows."""
    return write_files(tmp_path, 4)


def arguments(folder: str, *line: str) -> DataSettings:
    window = () if "--shuffle_buffer_size" in line else ("--shuffle_buffer_size", "7")
    return flags("--dataset_name", folder, "--streaming", *window, *line)


def batches(folder: str, *line: str, batch: int = 4) -> Any:
    return batches_from(arguments(folder, *line), per_device(batch), make_mesh(devices=jax.devices()[:1]), finish)


def captions(loader: Any, count: int) -> list[list[int]]:
    return [next(loader)["caption"].tolist() for _ in range(count)]


def test_every_epoch_has_every_row_once_in_a_new_order(parquet: str) -> None:
    loader = batches(parquet)
    seen = np.concatenate(captions(loader, 30)).reshape(3, 40)
    np.testing.assert_array_equal(np.sort(seen), np.broadcast_to(np.arange(40), (3, 40)))
    assert len({tuple(epoch) for epoch in seen}) == 3
    assert loader.names[0].startswith("row ")
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_positions_are_restored_to_the_bit(tmp_path: Path, workers: int) -> None:
    parquet = write_files(tmp_path, 2)
    line = ["--dataloader_num_workers", str(workers), "--random_flip"]
    loader = batches(parquet, *line, batch=3)
    seen, states = [], []
    for _ in range(12):
        seen.append(next(loader))
        states.append(json.loads(json.dumps(loader.get_state())))
    loader.close()
    for at in (4,) if workers else (0, 4, 9):  # within a window, at its end, in the second epoch
        again = batches(parquet, *line, batch=3)
        again.set_state(states[at])
        for batch in seen[at + 1 :]:
            made = next(again)
            for key in ("caption", "pixels", "index"):
                np.testing.assert_array_equal(made[key], batch[key])
        again.close()


def test_some_rows_only(parquet: str) -> None:
    loader = batches(parquet, "--max_train_samples", "12")
    epochs = np.sort(np.concatenate(captions(loader, 6)).reshape(2, 12))
    np.testing.assert_array_equal(epochs[0], epochs[1])
    assert len(set(epochs[0])) == 12
    assert loader.total == 12
    with pytest.raises(ValueError, match="takes 16 examples"):
        batches(parquet, "--max_train_samples", "12", batch=16)


def test_shares_divide_the_rows(parquet: str) -> None:
    stream = stream_from(arguments(parquet))
    seen = []
    for process in range(2):
        for worker in range(2):
            records = Records(stream.share(process, 2).share(worker, 2))
            seen += [int(next(records)[1].captions[0]) for _ in range(10)]
    assert sorted(seen) == list(range(40))


def test_a_share_without_rows_is_an_error(parquet: str) -> None:
    stream = stream_from(arguments(parquet, "--max_train_samples", "3"))
    with pytest.raises(ValueError, match="share 7 of 8 of the stream has no rows"):
        next(Records(stream.share(7, 8)))


def test_another_number_of_workers_is_refused(parquet: str) -> None:
    state = batches(parquet).get_state()
    other = batches(parquet, "--dataloader_num_workers", "3")
    with pytest.raises(ValueError, match="read by 1 processes with 1 workers each, this run has 1 with 3"):
        other.set_state(state)


def test_missing_columns_are_named(parquet: str) -> None:
    loader = StreamLoader(stream_from(arguments(parquet, "--caption_column", "gone")), Transform(8), finish, 2)
    with pytest.raises(ValueError, match=r"--caption_column 'gone': the data set has the columns \['image', 'text'\]"):
        next(loader)
