"""A job as its user sees it: each row and seed once, whatever fails, is interrupted or is divided."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from diffuse_jax.batch.grouping import batches
from diffuse_jax.batch.reporting import GIVE_UP, Status, few_warnings
from diffuse_jax.batch.sinks import Folders, Shards
from diffuse_jax.training.data import FolderSource
from diffuse_jax.training.data.shards import TarSource
from tests.batch.stub import Stub, run
from tests.disk import disk_of

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = ("folder", "webdataset")


def records(output: Path, layout: str) -> list[dict[str, Any]]:
    """The metadata of all finished images."""
    files = sorted(output.glob("*/metadata.jsonl" if layout == "folder" else "*.jsonl"))
    return [json.loads(line) for path in files if "failures" not in path.name for line in path.open(encoding="utf-8")]


def keys(output: Path, layout: str) -> list[tuple[int, int]]:
    """Row and seed of each image that is there."""
    return sorted((one["line"], one["seed"]) for one in records(output, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_for_each_row_and_seed_with_its_settings(tmp_path: Path, layout: str) -> None:
    prompts = ["a cat", {"prompt": "a dog", "seed": [7, 5], "guidance_scale": 2}, {"prompt": "ein Hündchen"}]
    report = run(prompts * 5, tmp_path / "out", layout=layout, height=8)
    assert (report.images, report.made, report.before, report.failed) == (20, 20, 0, 0)
    expected = [(n, s) for n in range(1, 16) for s in ([5, 7] if n % 3 == 2 else [n])]
    assert keys(tmp_path / "out", layout) == expected
    assert next(one for one in records(tmp_path / "out", layout) if one["file_name"] == "00000002-7.png") == {
        "file_name": "00000002-7.png", "text": "a dog", "line": 2, "seed": 7, "model": "stub", "prompt": "a dog",
        "height": 8, "guidance_scale": 2, "negative_prompt": "",
    }  # fmt: skip


def test_a_folder_is_an_image_data_set(tmp_path: Path) -> None:
    """Pixels are those of the prompt and the seed; the settings are in the file, as the web UI writes them."""
    run([f"prompt {i}" for i in range(25)], tmp_path / "out")
    source = FolderSource(tmp_path / "out")
    assert len(source) == 25
    assert {source[i].captions[0] for i in range(25)} == {f"prompt {i}" for i in range(25)}
    with Pillow.open(tmp_path / "out" / "00001" / "00000012-12.png") as image:
        assert image.info["parameters"].startswith("prompt 11\nSeed: 12, Size: 8x8")
        assert json.loads(image.info["diffuse_jax"])["line"] == 12


@pytest.mark.parametrize(("kind", "suffix"), [("jpeg", "jpg"), ("webp", "webp")])
def test_other_formats_have_the_settings_too(tmp_path: Path, kind: str, suffix: str) -> None:
    run(["ein Hündchen"], tmp_path / "out", kind=kind)
    with Pillow.open(tmp_path / "out" / "00000" / f"00000001-1.{suffix}") as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be").startswith("ein Hündchen\nSeed: 1")
    assert run(["é" * 40_000], tmp_path / "long", kind=kind).made == 1, "a JPEG has no room for it"


def test_shards_are_what_training_reads(tmp_path: Path) -> None:
    run([f"prompt {i}" for i in range(25)], tmp_path / "out", layout="webdataset")
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert [path.name for path in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    source = TarSource(shards)
    assert sorted(source[i].captions[0] for i in range(25)) == sorted(f"prompt {i}" for i in range(25))
    assert not list((tmp_path / "out").glob(".*"))


def test_rows_of_one_kind_share_batches(tmp_path: Path) -> None:
    """Size, steps and whether there is guidance decide; the prompt, its negative and the scale do not."""
    kinds = [
        {"height": 8, "guidance_scale": 3},
        {"height": 16, "guidance_scale": 1},
        {"height": 8, "guidance_scale": 9},
    ]
    stub = Stub(largest=4)
    run([{"prompt": f"{i}", **kinds[i % 3]} for i in range(24)], tmp_path / "out", stub)
    assert all(len(batch) == 4 for batch in stub.batches)
    small = {key for batch in stub.batches for key in batch if int(key[:8]) % 3 != 2}
    assert all({*batch} <= small or not {*batch} & small for batch in stub.batches)


def test_an_item_of_a_rare_group_does_not_wait_forever() -> None:
    items = [("rare" if i == 0 else "common", i) for i in range(100)]
    found = list(batches(items, 4, window=20))
    assert found.index([0]) == 4, "given out when it is 20 items old"
    assert sorted(i for batch in found for i in batch) == [*range(100)]
    assert max(map(len, found)) == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_fails_is_reported_and_the_rest_is_made(tmp_path: Path, layout: str) -> None:
    prompts = ["fine", {"prompt": "small", "height": -1}, "refused", {"promt": "x"}, "also fine", 3]
    report = run(prompts, tmp_path / "out", layout=layout)
    assert (report.made, report.failed) == (2, 4)
    assert {failure.line for failure in report.failures} == {2, 3, 4, 6}
    assert report.failures_file is not None
    in_file = [json.loads(line) for line in report.failures_file.read_text().splitlines()]
    assert {one["line"]: one["error"] for one in in_file}[3] == "the prompt is refused"
    assert keys(tmp_path / "out", layout) == [(1, 1), (5, 5)]
    prompts[1], prompts[5] = "corrected", "corrected too"
    again = run([*prompts, "added"], tmp_path / "out", layout=layout)
    assert (again.made, again.before, again.failed) == (3, 2, 2)
    assert [line for line, _ in keys(tmp_path / "out", layout)] == [1, 2, 5, 6, 7]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_that_cannot_be_written(tmp_path: Path, layout: str) -> None:
    """A full disk for one large image: the others are there, the block stays open, and the next run completes it."""

    class OneLarge(Stub):
        def pixels(self, image: Any) -> np.ndarray:
            noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
            return noise if image.job.number == 3 else super().pixels(image)

    with disk_of(60_000):
        report = run([f"{i}" for i in range(6)], tmp_path / "out", OneLarge(), layout=layout)
    assert (report.made, report.failed) == (5, 1)
    assert str(report.failures[0]).startswith("row 3, seed 3: ")
    assert "large" in str(report.failures[0]) or "space" in str(report.failures[0])
    assert not list((tmp_path / "out").glob("*.tar")), "a shard that lacks an image is not finished"
    again = run([f"{i}" for i in range(6)], tmp_path / "out", OneLarge(), layout=layout)
    assert (again.made, again.before, again.failed) == (1, 5, 0)
    assert len(keys(tmp_path / "out", layout)) == 6
    assert not list((tmp_path / "out").rglob(".*.partial"))


def test_what_the_safety_checker_says_is_stored(tmp_path: Path) -> None:
    class Checked(Stub):
        def finish(self, call: Any) -> Any:
            return [made._replace(flagged=made.image.job.number == 2) for made in super().finish(call)]

    assert run(["a", "b", "c"], tmp_path / "out", Checked()).flagged == 1
    flags = {one["line"]: one["nsfw_content_detected"] for one in records(tmp_path / "out", "folder")}
    assert flags == {1: False, 2: True, 3: False}
    assert run(["a", "b", "c"], tmp_path / "out").before == 3, "what was found out is no setting"


def test_a_disk_that_stays_full_ends_the_job(tmp_path: Path) -> None:
    class Broken(Folders):
        def open(self, block: int) -> Any:
            inner = super().open(block)
            inner.write = lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # type: ignore[method-assign]
            return inner

    with pytest.raises(RuntimeError, match=rf"{GIVE_UP} images in a row could not be written.*No space left"):
        run([f"{i}" for i in range(5000)], tmp_path / "out", sink=Broken(tmp_path / "out"))


def test_a_bug_in_a_writer_ends_the_job(tmp_path: Path) -> None:
    class Bug(Folders):
        def open(self, block: int) -> Any:
            inner = super().open(block)
            inner.write = lambda *args: {}["missing"]  # type: ignore[method-assign]
            return inner

    with pytest.raises(KeyError, match="missing"):
        run([f"{i}" for i in range(50)], tmp_path / "out", sink=Bug(tmp_path / "out"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_job_that_is_stopped_continues(tmp_path: Path, layout: str) -> None:
    prompts = [f"prompt {i}" for i in range(35)]
    seen: list[Status] = []
    stub = Stub(largest=3)
    report = run(prompts, tmp_path / "out", stub, layout=layout, report=seen.append, stop=lambda: len(stub.batches) > 4)
    assert report.stopped
    assert 0 < report.made < 35
    rest = run(prompts, tmp_path / "out", layout=layout)
    assert (rest.before, rest.made) == (report.made, 35 - report.made)
    assert not rest.stopped
    assert keys(tmp_path / "out", layout) == [(n, n) for n in range(1, 36)]
    none = run(prompts, tmp_path / "out", layout=layout)
    assert (none.before, none.made) == (35, 0)


def test_a_row_may_ask_for_more_images_than_anyone_will_wait_for(tmp_path: Path) -> None:
    """Its images are neither counted one by one nor listed, which would take hours and all memory."""
    most = 2**31 - 1
    rows = [{"prompt": "one"}, {"prompt": "many", "num_images_per_prompt": most}]
    made = 0
    for _ in range(2):
        stub = Stub()
        report = run(rows, tmp_path / "out", stub, stop=lambda stub=stub: len(stub.batches) > 4)
        assert report.stopped
        assert (report.images, report.before) == (most + 1, made)
        assert report.made > 0
        made += report.made
    assert keys(tmp_path / "out", "folder") == [(1, 1), *((2, 2 + i) for i in range(made - 1))]


@pytest.mark.parametrize("layout", ["folder", pytest.param("webdataset", marks=pytest.mark.slow)])
def test_a_job_that_is_killed_continues(tmp_path: Path, layout: str) -> None:
    """kill -9 at some moment, twice: nothing half-written counts, nothing is made twice."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"prompt {i}\n" for i in range(300)))
    output = tmp_path / "out"
    sink = (Folders if layout == "folder" else Shards)(output)
    there = lambda: sum(len(sink.recorded(block)) for block in range(30))
    line = [sys.executable, "-m", "tests.batch.stub", str(prompts), str(output), layout, "0", "1"]
    for least in (15, 40):
        process = subprocess.Popen(line, cwd=ROOT)
        deadline = time.monotonic() + 120
        while there() < least:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
    before = there()
    report = run(prompts, output, layout=layout)
    assert report.before == before
    assert report.made == 300 - before
    counts = Counter(keys(output, layout))
    assert counts == Counter({(n, n): 1 for n in range(1, 301)})
    assert not list(output.rglob(".*"))


def test_what_a_crash_left_of_a_line_and_of_a_member_is_cut_off(tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(5)]
    run(prompts, tmp_path / "a")
    metadata = tmp_path / "a" / "00000" / "metadata.jsonl"
    text = metadata.read_text()
    metadata.write_text(text[:-20])
    whole_line = json.loads(text.splitlines()[0])  # its image may be any: several threads write them
    (metadata.parent / whole_line["file_name"]).unlink()
    assert run(prompts, tmp_path / "a").made == 2
    assert keys(tmp_path / "a", "folder") == [(n, n) for n in range(1, 6)]
    run(prompts, tmp_path / "b", layout="webdataset")
    whole = (tmp_path / "b" / "00000.tar").read_bytes()
    for cut in (512, 3000, 7000):
        (tmp_path / "b" / "00000.tar").unlink(missing_ok=True)
        (tmp_path / "b" / ".00000.tar.partial").write_bytes(whole[:cut])
        run(prompts, tmp_path / "b", layout="webdataset")
        assert len(TarSource([tmp_path / "b" / "00000.tar"])) == 5


def test_metadata_that_is_damaged_is_made_again(tmp_path: Path) -> None:
    """A loss of power can leave zeros; a line that names no image, or no object, counts as missing."""
    prompts = [f"prompt {i}" for i in range(5)]
    run(prompts, tmp_path / "a")
    metadata = tmp_path / "a" / "00000" / "metadata.jsonl"
    lines = metadata.read_bytes().splitlines()
    metadata.write_bytes(b"\n".join([bytes(8), b"[1]", b"{}", *lines[2:], b""]))
    assert run(prompts, tmp_path / "a").made == 2
    assert keys(tmp_path / "a", "folder") == [(n, n) for n in range(1, 6)]
    run(prompts, tmp_path / "b", layout="webdataset")
    (tmp_path / "b" / "00000.jsonl").write_bytes(b"{\n")
    assert run(prompts, tmp_path / "b", layout="webdataset").made == 0, "the shard itself has what its metadata lost"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_prompts_are_noticed(tmp_path: Path, layout: str) -> None:
    run(["a", "b", "c"], tmp_path / "out", layout=layout)
    for prompts, why in {
        ("a", "x", "c"): "00000002-2.png was made with text 'b', and row 2 has 'x'",
        ("a", "b"): "no row asks for 00000003-3.png",
        ("x", "a", "b", "c"): "text 'a', and row 1 has 'x'",
    }.items():
        with pytest.raises(ValueError, match=why):
            run([*prompts], tmp_path / "out", layout=layout)
    with pytest.raises(ValueError, match="made with height None, and row 1 has 8"):
        run(["a", "b", "c"], tmp_path / "out", layout=layout, height=8)


def test_two_processes_divide_a_job_and_one_can_finish_it(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"prompt {i}\n" for i in range(45)))
    for layout in LAYOUTS:
        output = tmp_path / layout
        line = [sys.executable, "-m", "tests.batch.stub", str(prompts), str(output), layout]
        both = [subprocess.Popen([*line, str(i), "2"], cwd=ROOT) for i in range(2)]
        assert [process.wait(timeout=120) for process in both] == [0, 0]
        assert keys(output, layout) == [(n, n) for n in range(1, 46)]
        run(prompts, tmp_path / f"{layout}-one", layout=layout)
        assert sorted(map(str, records(output, layout))) == sorted(
            map(str, records(tmp_path / f"{layout}-one", layout))
        )
    first = run(prompts, tmp_path / "half", process=(1, 2))
    rest = run(prompts, tmp_path / "half")
    assert (first.made, rest.before, rest.made) == (20, 20, 25)


def test_a_block_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    for sink in (Folders(tmp_path / "a"), Shards(tmp_path / "b")):
        held = sink.open(0)
        with pytest.raises(FileExistsError, match="is being written by another process"):
            run(["a"], sink.output, sink=sink)
        held.close(False)


class NoFiles:
    """A sink that counts."""

    def __init__(self) -> None:
        self.written = self.opened = self.most = 0

    def last(self) -> int:
        return -1

    def recorded(self, block: int) -> dict[str, Any]:
        return {}

    def unfinished(self, block: int) -> bool:
        return False

    def open(self, block: int) -> NoFiles:
        self.opened += 1
        self.most = max(self.most, self.opened)
        return self

    def write(self, name: str, data: bytes, record: dict[str, Any]) -> None:
        self.written += 1

    def close(self, complete: bool) -> None:
        self.opened -= 1


@pytest.mark.parametrize("rows", [50_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_prompts(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three kinds, one of them rare, from a file; every image is announced, made and written."""
    monkeypatch.setattr("diffuse_jax.batch.loop.encoded", lambda *args: b"")
    path = tmp_path / "prompts.jsonl"
    with path.open("w") as file:
        for i in range(rows):
            size = 24 if i % 9973 == 0 else 16 if i % 3 else 8
            file.write(f'{{"prompt": "a rather long prompt, number {i}", "height": {size}}}\n')
    resident: list[int] = []
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("needs Linux's /proc to see the memory of the process")

    class Watching(Stub):
        def batch(self, images: Any) -> Any:
            self.batches.clear()
            if images[0].job.number % 1000 < self.largest:
                resident.append(int(statm.read_text().split()[1]) * 4096)
            return super().batch(images)

    sink = NoFiles()
    report = run(path, tmp_path / "out", Watching(largest=64), sink=sink, rows_per_block=1000)
    assert (report.made, sink.written, sink.opened) == (rows, rows, 0)
    assert sink.most < 10
    assert len(resident) > rows / 2000
    assert max(resident) - resident[len(resident) // 10] < 16 << 20, "80 bytes an image would be this much"


def test_warnings_that_repeat_are_counted(recwarn: pytest.WarningsRecorder) -> None:
    import warnings

    with few_warnings(2):
        for i in range(1000):
            warnings.warn(f"the prompt is {i} tokens too long: 'word {i}'", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    texts = [str(one.message) for one in recwarn]
    assert len(texts) == 4
    assert texts[-1].startswith("998 more times: the prompt is … tokens too long")


def test_progress_in_words() -> None:
    assert (
        str(Status(1234, 200_000, 2, 12.3, 16156))
        == "1,234/200,000 images (0.6 %), 2 failed, 12 images/s, 4 h 29 min left"
    )
    assert str(Status(0, 10, 0, 0.0, None)) == "0/10 images (0.0 %)"
