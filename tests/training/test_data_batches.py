"""Batches from flags: the same whatever makes them, and restored bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.batches import IndexedBatches
from diffuse_jax.training.data import DataSettings, batches_from
from diffuse_jax.training.data.loader import Loader, Maker
from diffuse_jax.training.data.order import Plain
from diffuse_jax.training.data.sources import FolderSource
from diffuse_jax.training.data.transform import Transform
from diffuse_jax.training.dreambooth import Interleaved

from .data_sets import finish, flags, image_folder, per_device


def mesh(devices: int = 1) -> jax.sharding.Mesh:
    return make_mesh(devices=jax.devices()[:devices])


def take(batches: Loader, count: int) -> list[dict[str, np.ndarray]]:
    return [next(batches) for _ in range(count)]


def assert_same(ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for key in a.keys() - {"process"}:
            np.testing.assert_array_equal(a[key], b[key])


def test_a_batch_holds_images_and_their_captions(tmp_path: Path) -> None:
    batches = batches_from(flags("--train_data_dir", str(image_folder(tmp_path, 10))), per_device(4), mesh(), finish)
    seen = take(batches, 5)
    assert seen[0]["pixels"].shape == (4, 8, 8, 3)
    for batch in seen:
        np.testing.assert_array_equal(batch["pixels"][:, 0, 0, 0], batch["caption"])
    assert batches.names == [str(tmp_path / f"{i}.png") for i in seen[-1]["index"]]
    assert sorted(np.concatenate([b["index"] for b in seen])[:10]) == list(range(10))
    assert batches.total == 10
    batches.close()


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], (3, 6)), (["--data_repeats", "3", "1"], (9, 6)), (["--data_weights", "0.5", "1.5"], (2, 7))],
)
def test_several_folders_are_mixed(tmp_path: Path, words: list[str], expected: tuple[int, int]) -> None:
    folders = [str(image_folder(tmp_path / name, count)) for name, count in (("a", 3), ("b", 6))]
    batches = batches_from(flags("--train_data_dir", *folders, *words), per_device(1), mesh(), finish)
    total = sum(expected)
    assert batches.total == total
    for _ in range(2):
        names = []
        for _ in range(total):
            batch = next(batches)
            names += batches.names
            np.testing.assert_array_equal(batch["pixels"][:, 0, 0, 0], batch["caption"])
        assert tuple(sum(name.startswith(folder + "/") for name in names) for folder in folders) == expected
    batches.close()


def test_other_repeats_after_a_checkpoint_are_mentioned(tmp_path: Path) -> None:
    folders = [str(image_folder(tmp_path / name, count)) for name, count in (("a", 3), ("b", 6))]
    line = ["--train_data_dir", *folders, "--data_repeats", "2"]
    state = batches_from(flags(*line, "1"), per_device(1), mesh(), finish).get_state()
    batches_from(flags(*line, "1"), per_device(1), mesh(), finish).set_state(state)
    other = batches_from(flags(*line, "3"), per_device(1), mesh(), finish)
    with pytest.warns(UserWarning, match=r"with 6 \+ 6 examples per epoch, this run has 6 \+ 18: the order of"):
        other.set_state(json.loads(json.dumps(state)))


def test_buckets_have_the_repeats_of_folders(tmp_path: Path) -> None:
    folders = [str(image_folder(tmp_path / name, 4, [(8, 8), (8, 16)])) for name in "ab"]
    line = ["--aspect_ratio_buckets", "--bucket_step", "4", "--data_cache_dir", str(tmp_path / "cache")]
    data = flags("--train_data_dir", *folders, "--data_repeats", "2", "1", *line)
    batches, names = batches_from(data, per_device(2), mesh(), finish), []
    for _ in range(6):
        next(batches)
        names += batches.names
    counts = [sum(name.startswith(folder + "/") for name in names) for folder in folders]
    assert counts == [8, 4]
    batches.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--train_data_dir a b --data_repeats 2", "--data_repeats 2 must have one number for each folder .* names 2"),
        ("--dataset_name a --data_repeats 2", "--data_repeats 2 must have one number for each folder .* names 0"),
        ("--train_data_dir a b ./a --data_repeats 1 1 1", "has a twice; name it once, and how often with --data_rep"),
        ("--train_data_dir a b --data_weights 2 1 --data_repeats 1 1", "give one of them"),
        ("--train_data_dir a b --data_weights 2 1 --aspect_ratio_buckets --resolution 64", "use --data_repeats"),
        ("--train_data_dir a b --data_repeats 2 1 --max_train_samples 3", "leave out --data_repeats"),
    ],
)
def test_impossible_shares_are_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flags(*words.split())


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"data_repeats": (2, 0)}, "data_repeats must be a whole number of at least 1 .*, got 0"),
        ({"data_weights": (2.0, -1.0)}, "data_weights must be .*, got -1.0"),
        ({"data_weights": (2.0, float("inf"))}, "data_weights must be .*, got inf"),
    ],
)
def test_every_share_is_a_positive_number(
    shares: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        DataSettings(train_data_dir=("a", "b"), **shares)
    ((name, values),) = shares.items()
    with pytest.raises(SystemExit):
        flags("--train_data_dir", "a", "b", f"--{name}", *map(str, values))
    assert f"--{name}" in capsys.readouterr().err


def test_positions_are_restored_exactly_and_prefetched_batches_are_not_lost(tmp_path: Path) -> None:
    data = flags("--train_data_dir", str(image_folder(tmp_path, 10, [(9, 20)])), "--random_flip")
    batches = batches_from(data, per_device(3), mesh(), finish)
    first = take(batches, 2)
    time.sleep(0.1)  # more batches are being made
    state = json.loads(json.dumps(batches.get_state()))
    rest = take(batches, 6)
    again = batches_from(data, per_device(3), mesh(), finish)
    again.set_state(state)
    assert_same(take(again, 6), rest)
    batches.set_state(state)
    assert_same(take(batches, 6), rest)
    assert len({b["pixels"].tobytes() for b in first + rest}) == 8


def test_worker_processes_make_the_same_batches(tmp_path: Path) -> None:
    others = set(multiprocessing.active_children())
    line = ["--train_data_dir", str(image_folder(tmp_path, 10, [(9, 20)])), "--random_flip"]
    threads = batches_from(flags(*line), per_device(3), mesh(), finish)
    workers = batches_from(flags(*line, "--dataloader_num_workers", "2"), per_device(3), mesh(), finish)
    wanted = take(threads, 7)
    made = take(workers, 4)
    assert_same(made, wanted[:4])
    assert len({int(b["process"][0]) for b in made} - {int(wanted[0]["process"][0])}) == 2
    threads.set_state(workers.get_state())
    assert_same(take(threads, 3), wanted[4:])
    assert all(type(array) is np.ndarray for array in made[0].values()), "no memory of a worker is left in a batch"
    workers.close()
    assert not set(multiprocessing.active_children()) - others


def test_an_error_in_a_worker_names_the_image(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, 4)
    for i in range(4):
        (folder / f"{i}.png").write_bytes(b"damaged")
    data = flags("--train_data_dir", str(folder), "--dataloader_num_workers", "1")
    batches = batches_from(data, per_device(), mesh(), finish)
    with pytest.raises(ValueError, match=r"\d.png is not a readable image"):
        next(batches)


def test_images_of_instance_and_class_alternate(tmp_path: Path) -> None:
    others = set(threading.enumerate())
    folders = [str(image_folder(tmp_path / name, count)) for name, count in (("instance", 4), ("class", 9))]
    make = lambda: Interleaved(
        *(batches_from(flags("--train_data_dir", f), per_device(), mesh(), finish) for f in folders)
    )
    both = make()
    first = take(both, 3)
    assert both.total == 9
    assert first[0]["prior"].tolist() == [False, True, False, True]
    assert [Path(name).parent.name for name in both.names] == ["instance"] * 2 + ["class"] * 2
    state, rest = json.loads(json.dumps(both.get_state())), take(both, 2)
    again = make()
    again.set_state(state)
    assert_same(take(again, 2), rest)
    for batches in (both, again):
        batches.close()
    assert not set(threading.enumerate()) - others


def test_images_of_a_class_count_everywhere() -> None:
    mask = np.full((2, 3, 3), 0.5, np.float32)
    masked, plain = (
        IndexedBatches(lambda n: {"x": np.full(2, 1), "loss_mask": mask}),
        IndexedBatches(lambda n: {"x": np.full(2, 2)}),
    )
    masked.total = plain.total = 2  # type: ignore[attr-defined]
    batch = next(Interleaved(masked, plain))
    assert batch["x"].tolist() == [1, 2, 1, 2]
    np.testing.assert_array_equal(batch["loss_mask"], np.float32([0.5, 1, 0.5, 1])[:, None, None] * np.ones((3, 3)))


def test_processes_divide_the_batch_of_one(tmp_path: Path) -> None:
    source = FolderSource(image_folder(tmp_path, 10))
    make = lambda rows: Maker(source, Transform(8), Plain(0, 10, 8), np.array(rows), finish)(24)[0]
    whole, parts = make(range(8)), [make([0, 1, 4, 5]), make([2, 3, 6, 7])]
    np.testing.assert_array_equal(whole["index"][[0, 1, 4, 5]], parts[0]["index"])
    np.testing.assert_array_equal(whole["index"][[2, 3, 6, 7]], parts[1]["index"])


def test_resuming_with_fewer_images_per_step(tmp_path: Path) -> None:
    """The position counts examples: on fewer devices the run continues with the next ones."""
    line = ["--train_data_dir", str(image_folder(tmp_path, 20))]
    two, one = (batches_from(flags(*line), per_device(), mesh(n), finish) for n in (2, 1))
    assert len(next(two)["index"]) == 4
    one.set_state(two.get_state())
    following = np.concatenate([b["index"] for b in take(one, 4)])
    np.testing.assert_array_equal(following, np.concatenate([b["index"] for b in take(two, 2)]))


def test_buckets(tmp_path: Path) -> None:
    """Each batch has one size; small images are enlarged to cover it."""
    folder = image_folder(tmp_path / "data", 12, [(30, 20), (20, 30), (20, 20)])
    line = ["--train_data_dir", str(folder), "--resolution", "16", "--aspect_ratio_buckets", "--bucket_step", "4"]
    data = flags(*line, output_dir=str(tmp_path / "out"))
    batches = batches_from(data, per_device(), mesh(), finish)
    seen = take(batches, 12)
    shapes = {batch["pixels"].shape[1:3] for batch in seen}
    assert shapes == {(20, 12), (12, 20), (16, 16)}
    state = batches.get_state()
    rest = take(batches, 3)
    again = batches_from(data, per_device(), mesh(), finish)
    again.set_state(state)
    assert_same(take(again, 3), rest)
    with pytest.raises(ValueError, match="written with 2 examples per step, this run has 4"):
        batches_from(data, per_device(), mesh(2), finish).set_state(state)


SCRIPT = """
import sys
import time

import numpy as np
from diffuse_jax.training.data.loader import Loader, Maker
from diffuse_jax.training.data.order import Plain
from diffuse_jax.training.data.sources import FolderSource
from diffuse_jax.training.data.transform import Transform


def finish(example):
    import os
    return {"index": np.int64(example.index), "jax": np.bool_("jax" in sys.modules), "process": np.int64(os.getpid())}


def main(folder):
    maker = Maker(FolderSource(folder), Transform(8), Plain(0, 4, 2), np.arange(2), finish)
    batches = Loader(maker, workers=2)
    found = [next(batches) for _ in range(4)]
    print(sorted(np.concatenate([b["index"] for b in found[:2]]).tolist()), any(b["jax"].any() for b in found))
    print(*{int(b["process"][0]) for b in found}, flush=True)
    time.sleep(float(sys.argv[2]))

"""
GUARDED = 'if __name__ == "__main__":\n    main(sys.argv[1])\n'


def start_script(tmp_path: Path, end: str, seconds: int = 0) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + end)
    command = [sys.executable, str(script), str(image_folder(tmp_path / "data", 4)), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_script_ends_by_itself_and_its_workers_do_without_jax(tmp_path: Path) -> None:
    """It closes nothing while batches are being prefetched."""
    with start_script(tmp_path, GUARDED) as script:
        out, errors = script.communicate(timeout=300)
    assert (script.returncode, errors, out.splitlines()[0]) == (0, "", "[0, 1, 2, 3] False")


def test_workers_die_with_the_script(tmp_path: Path) -> None:
    with start_script(tmp_path, GUARDED, seconds=600) as script:
        assert script.stdout is not None
        script.stdout.readline()
        workers = [int(process) for process in script.stdout.readline().split()]
        assert len(workers) == 2
        script.kill()
        script.communicate()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, f"{workers} are still there"
        time.sleep(0.1)


def test_a_script_without_a_guard_says_what_to_do(tmp_path: Path) -> None:
    with start_script(tmp_path, "main(sys.argv[1])\n") as script:
        errors = script.communicate(timeout=300)[1]
    assert script.returncode != 0
    assert 'code outside of `if __name__ == "__main__":`' in errors.splitlines()[-1]
