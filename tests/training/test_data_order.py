"""Which rows each batch holds."""

from __future__ import annotations

import numpy as np
import pytest

from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.data.buckets import bucket_sizes
from diffuse_jax.training.data.loader import process_rows
from diffuse_jax.training.data.order import Bucketed, Mixed, Plain, shares


@pytest.mark.parametrize(("size", "total"), [(4, 10), (16, 5)])
def test_every_epoch_visits_each_row_once(size: int, total: int) -> None:
    batches = [Plain(0, total, size)(size * n).indices for n in range(20)]
    stream = np.concatenate(batches)
    epochs = stream[: len(stream) // total * total].reshape(-1, total)
    np.testing.assert_array_equal(np.sort(epochs), np.broadcast_to(np.arange(total), epochs.shape))
    assert any(tuple(epochs[0]) != tuple(epoch) for epoch in epochs)
    other = np.concatenate([Plain(1, total, size)(size * n).indices for n in range(20)])
    assert tuple(stream) != tuple(other)


def test_batches_of_another_size_continue_where_the_run_is() -> None:
    together = np.concatenate([Plain(0, 10, 4)(0).indices, Plain(0, 10, 3)(4).indices, Plain(0, 10, 5)(7).indices])
    np.testing.assert_array_equal(together, Plain(0, 10, 12)(0).indices)


def test_buckets_are_visited_evenly_and_not_mixed() -> None:
    members = [np.arange(10), np.arange(10, 13), np.arange(13, 30)]
    order = Bucketed(0, members, [(8, 8), (4, 16), (16, 4)], batch_size=4)
    epochs = 40
    batches = [order(4 * n) for n in range(30 * epochs // 4)]
    for rows, size in batches:
        bucket = [(8, 8), (4, 16), (16, 4)].index(size)
        assert set(rows) <= set(members[bucket])
    counts = np.bincount(np.concatenate([rows for rows, _ in batches]), minlength=30)
    assert abs(counts - epochs).max() <= 2, "no row is left out, whatever is left over in its bucket"
    np.testing.assert_array_equal(order(4 * 17).indices, batches[17].indices)
    sizes = [size for _, size in batches]
    assert sizes[:40] != sorted(sizes[:40]), "buckets alternate"


def test_data_sets_have_their_shares_of_every_epoch() -> None:
    """And within each, all rows are seen equally often."""
    order = Mixed(0, lengths=(4, 6, 10), counts=(12, 6, 5), batch_size=5)
    assert order.total == 23
    rows = np.concatenate([order(5 * n).indices for n in range(23 * 8)])  # 40 epochs
    sets = np.digitize(rows, (4, 10))
    for epoch in sets.reshape(40, 23):
        np.testing.assert_array_equal(np.bincount(epoch), (12, 6, 5))
    assert any(tuple(sets[:23]) != tuple(sets[23 * n : 23 * (n + 1)]) for n in range(40)), "in another order"
    np.testing.assert_array_equal(np.bincount(rows), [120] * 4 + [40] * 6 + [20] * 10)
    np.testing.assert_array_equal(np.sort(rows[sets == 2][:10]), np.arange(10, 20), "all before one comes again")
    again = Mixed(0, order.lengths, order.counts, batch_size=7)
    np.testing.assert_array_equal(again(5 * 11).indices, rows[55:62], "the batch size does not matter")


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [((1, 1), 10, (5, 5)), ((0.8, 0.2), 13, (10, 3)), ((1, 1, 1), 10, (4, 3, 3)), ((1e6, 1), 10, (9, 1))],
)
def test_shares_are_whole_numbers(weights: tuple[float, ...], total: int, expected: tuple[int, ...]) -> None:
    assert shares(weights, total) == expected


def test_bucket_sizes() -> None:
    sizes = bucket_sizes(1024, 64, max_aspect=4)
    assert {(1024, 1024), (832, 1216), (1216, 832), (512, 2048), (640, 1600)} <= set(sizes)
    assert all(h % 64 == w % 64 == 0 and h * w <= 1024**2 and max(h, w) <= 4 * min(h, w) for h, w in sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    with pytest.raises(ValueError, match="--bucket_step 64 must divide --resolution 500"):
        bucket_sizes(500)
    with pytest.raises(ValueError, match="--bucket_max_aspect must be at least 1, got 0.5"):
        bucket_sizes(512, 64, 0.5)


def rows_of(axes: dict[str, int], process: int, devices: int) -> list[int]:
    """For 2 accumulation steps of 8 rows, where a process has so many devices."""
    return process_rows(make_mesh(**axes), 2, 8, lambda device: device.id // devices == process).tolist()


def test_one_process_provides_all_rows_in_order() -> None:
    assert rows_of({"data": 2, "fsdp": 4}, 0, devices=8) == list(range(16))


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 4, "tensor": 2}])
def test_two_processes_divide_each_accumulation_step(axes: dict[str, int]) -> None:
    assert rows_of(axes, 0, devices=4) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert rows_of(axes, 1, devices=4) == [4, 5, 6, 7, 12, 13, 14, 15]


def test_processes_that_share_rows_provide_the_same() -> None:
    assert rows_of({"data": 1, "tensor": 8}, 0, devices=4) == rows_of({"data": 1, "tensor": 8}, 1, devices=4)
    assert rows_of({"data": 2, "tensor": 4}, 1, devices=2) == [0, 1, 2, 3, 8, 9, 10, 11]
