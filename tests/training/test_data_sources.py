"""Sources of images: every kind of data set gives the same records; errors name what is wrong."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np
import pytest

from diffuse_jax.images import find_images
from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.data import (
    DataSettings,
    FolderSource,
    Source,
    TarSource,
    batches_from,
    source_from,
    write_array_record,
    write_tar,
)
from diffuse_jax.training.data.shards import braces, shard_source
from diffuse_jax.training.data.sources import METADATA, OTHER_IMAGES
from diffuse_jax.training.data.transform import Record, decode
from diffuse_jax.training.dreambooth import FixedPrompts

from .data_sets import finish, flags, flat_image, image_folder, per_device, png, table

Row = tuple[str, bytes, Any]


def rows(numbers: range) -> list[Row]:
    return [(f"{i}.png", png(flat_image(i)), str(i)) for i in numbers]


def folder(path: Path) -> list[str]:
    return ["--train_data_dir", str(image_folder(path / "a", 6))]


def nested(path: Path) -> list[str]:
    """Two folders with a ``metadata.jsonl`` each."""
    image_folder(path / "a" / "0", 3)
    image_folder(path / "a" / "1", 6)
    lines = (path / "a" / "1" / "metadata.jsonl").read_text().splitlines()
    (path / "a" / "1" / "metadata.jsonl").write_text("\n".join(lines[3:]))
    return ["--train_data_dir", str(path / "a")]


def parquet(path: Path) -> list[str]:
    (path / "a").mkdir()
    table(6).to_parquet(path / "a" / "train.parquet")
    return ["--dataset_name", str(path / "a"), "--cache_dir", str(path / "cache")]


def saved(path: Path) -> list[str]:
    table(6).save_to_disk(path / "a")
    return ["--train_data_dir", str(path / "a"), "--load_from_disk"]


def saved_splits(path: Path) -> list[str]:
    import datasets

    datasets.DatasetDict(train=table(6), test=table(2)).save_to_disk(path / "a")
    return ["--train_data_dir", str(path / "a"), "--load_from_disk"]


def folder_through_datasets(path: Path) -> list[str]:
    return ["--dataset_name", folder(path)[1], "--cache_dir", str(path / "cache")]


def tar(path: Path) -> list[str]:
    write_tar(path / "a-00.tar", rows(range(2)))
    write_tar(path / "a-01.tar", rows(range(2, 6)))
    return ["--train_shards", str(path / "a-{00..01}.tar")]


def array_record(path: Path) -> list[str]:
    write_array_record(path / "a.array_record", rows(range(4)))
    write_array_record(path / "b.array_record", rows(range(4, 6)))
    return ["--train_shards", str(path / "a.array_record"), str(path / "b.*")]


KINDS = (folder, nested, parquet, saved, saved_splits, folder_through_datasets, tar, array_record)


def with_cache(line: list[str]) -> DataSettings:
    """The settings of flags; ``--cache_dir`` is a flag of whole scripts."""
    if "--cache_dir" in line:
        at = line.index("--cache_dir")
        return flags(*line[:at], cache_dir=line[at + 1])
    return flags(*line)


def values(source: Source) -> list[tuple[int, tuple[str, ...]]]:
    return [(int(np.asarray(decode(record))[0, 0, 0]), record.captions) for record in map(source.__getitem__, range(6))]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_data_set(tmp_path: Path, kind: Callable[[Path], list[str]]) -> None:
    data = with_cache(kind(tmp_path))
    source = source_from(data)
    assert len(source) == 6
    assert values(source) == [(i, (str(i),)) for i in range(6)]
    copy = pickle.loads(pickle.dumps(source))
    assert values(copy) == values(source)
    assert source.fingerprint == copy.fingerprint == source_from(data).fingerprint
    assert len(pickle.dumps(source)) < 20_000, "images stay on disk"
    mesh = make_mesh(devices=jax.devices()[:1])
    batch = next(batches_from(data, per_device(), mesh, finish, source=source))
    np.testing.assert_array_equal(batch["pixels"][:, 0, 0, 0], batch["caption"])


def test_some_images_only(tmp_path: Path) -> None:
    line = ["--train_data_dir", str(image_folder(tmp_path, 20)), "--max_train_samples"]
    source = source_from(flags(*line, "5"))
    names = [source[i].name for i in range(len(source))]
    assert len(set(names)) == 5
    assert names == [source_from(flags(*line, "5"))[i].name for i in range(5)]
    assert names != [source_from(flags(*line, "5", seed=1))[i].name for i in range(5)]
    assert len(source_from(flags(*line, "100"))) == 20
    assert source.fingerprint != source_from(flags(*line, "6")).fingerprint


def test_captions_may_be_lists_and_columns_have_names(tmp_path: Path) -> None:
    texts = [["one", "two"], ["three"]]
    table(2, caption=texts).rename_column("image", "photo").save_to_disk(tmp_path / "a")
    line = ["--load_from_disk", "--image_column", "photo", "--caption_column", "caption", "--train_data_dir"]
    source = source_from(flags(*line, str(tmp_path / "a")))
    assert [source[i].captions for i in range(2)] == [("one", "two"), ("three",)]
    write_tar(tmp_path / "a.tar", [("0.png", png(flat_image(0)), ["a", "b"])])
    assert source_from(flags("--train_shards", str(tmp_path / "a.tar")))[0].captions == ("a", "b")


def with_control_images(folder: Path, key: str = "control") -> Path:
    """An image folder whose control image number n has the value 100 + n."""
    image_folder(folder, 3)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "edges").mkdir()
    for n, line in enumerate(lines):
        flat_image(100 + n).save(folder / "edges" / f"{n}.png")
        line[key] = f"edges/{n}.png"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.mark.parametrize("field", ["conditioning", "mask"])
def test_every_kind_of_data_set_may_have_control_images_and_masks(field: str, tmp_path: Path) -> None:
    flag = OTHER_IMAGES[field][0].removeprefix("--")
    members = [(f"{n}.{suffix}", content) for n in range(3) for suffix, content in
               (("png", png(flat_image(n))), ("control.png", png(flat_image(100 + n))), ("txt", b"a"))]  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    images = [{"bytes": png(flat_image(100 + n)), "path": None} for n in range(3)]
    rows = table(3, control=images)
    rows.cast_column("control", datasets.Image()).save_to_disk(tmp_path / "saved")
    for line in (
        ["--train_data_dir", str(with_control_images(tmp_path / "folder"))],
        ["--train_data_dir", str(with_control_images(tmp_path / "hub", "control_file_name"))],
        ["--train_shards", str(tmp_path / "a.tar")],
        ["--load_from_disk", "--train_data_dir", str(tmp_path / "saved")],
    ):
        source = pickle.loads(pickle.dumps(source_from(flags(*line, **{flag: "control"}))))
        assert [first_value(getattr(source[n], field)) for n in range(3)] == [100, 101, 102]
        assert getattr(source_from(flags(*line))[0], field) is None
        with pytest.raises(ValueError, match=rf"--{flag}|no \.depth\.png"):
            source_from(flags(*line, **{flag: "depth"}))


def first_value(image: bytes | str | None) -> int:
    assert image is not None
    return int(np.asarray(decode(Record(image, (), "")))[0, 0, 0])


def test_a_changed_control_image_is_another_data_set_and_a_missing_one_an_error(tmp_path: Path) -> None:
    folder = with_control_images(tmp_path / "a")
    before = FolderSource(folder, "text", "control").fingerprint
    flat_image(7, 9, 9).save(folder / "edges" / "1.png")
    assert FolderSource(folder, "text", "control").fingerprint != before
    (folder / "edges" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata.jsonl:2: .*edges/1.png does not exist"):
        FolderSource(folder, "text", "control")


def test_array_records_have_no_control_images(tmp_path: Path) -> None:
    (tmp_path / "a.array_record").touch()
    with pytest.raises(ValueError, match="ArrayRecord files hold no control images"):
        shard_source([str(tmp_path / "a.array_record")], None, "control")
    with pytest.raises(ValueError, match=r"ArrayRecord files hold no masks \(--mask_column\); use .tar files"):
        shard_source([str(tmp_path / "a.array_record")], None, mask_column="control")


def test_images_alone_need_no_metadata(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        flat_image(1).save(tmp_path / name)
    source = FolderSource(tmp_path, caption_column=None)
    assert [Path(source[i].name).name for i in range(2)] == ["a.png", "b.png"]
    assert source[0].captions == ("",)


def test_a_changed_image_is_another_data_set(tmp_path: Path) -> None:
    image_folder(tmp_path, 3)
    before = FolderSource(tmp_path).fingerprint
    flat_image(200, 9).save(tmp_path / "1.png")
    assert FolderSource(tmp_path).fingerprint != before


def test_braces() -> None:
    assert list(braces("a-{008..010}.{tar,zip}"))[:3] == ["a-008.tar", "a-008.zip", "a-009.tar"]
    assert list(braces("plain")) == ["plain"]


@pytest.mark.parametrize(
    ("line", "message"),
    [({"file_name": "0.png"}, "no column 'text'"), ({"file_name": "0.png", "text": 3}, "must be a text"),
     ({"file_name": "0.png", "text": []}, "must be a text"), ({"text": "a"}, 'needs a "file_name"'),
     ({"file_name": "0.png", "text": "\ud83d"}, "not valid Unicode"),
     ({"file_name": "x" * 5000, "text": "a"}, "does not exist")],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path: Path, line: dict[str, object], message: str) -> None:
    image_folder(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text("\n" + json.dumps(line))
    with pytest.raises((ValueError, FileNotFoundError), match=rf"metadata.jsonl:2: .*{message}"):
        FolderSource(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [("[" * 100_000, "nested more than 64 levels"), ('{"file_name": "0.png", "text": "", "text": ""}', "'text' twice")],
)
def test_lines_that_are_not_plain_json_are_named(tmp_path: Path, line: str, message: str) -> None:
    image_folder(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text("\n" + line)
    with pytest.raises(ValueError, match=rf"metadata.jsonl:2: the line .*{message}"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("name", METADATA)
def test_a_pipe_instead_of_metadata_is_refused(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: is not a regular file"):
        FolderSource(tmp_path)


def test_file_names_need_not_be_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    path.write_bytes(png(flat_image(7)))
    source = FolderSource(tmp_path, caption_column=None)
    assert [np.asarray(decode(source[0]))[0, 0, 0], len(source.fingerprint)] == [7, 32]
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        shard.add(path, "\udcff.png")
    assert np.asarray(decode(TarSource([tmp_path / "a.tar"], None)[0]))[0, 0, 0] == 7


def test_images_that_no_metadata_names_are_left_out_with_a_warning(tmp_path: Path) -> None:
    image_folder(tmp_path, 2)
    image_folder(tmp_path / "below", 3)  # its metadata is not read either
    with pytest.warns(UserWarning, match=r"3 images are left out because no metadata names them, .*below.0\.png"):
        assert len(FolderSource(tmp_path)) == 2
    assert len(FolderSource(tmp_path, caption_column=None, metadata=False)) == 5
    assert len(FixedPrompts(tmp_path, ("a",))) == 5, "DreamBooth reads no metadata"


def test_folders_that_cannot_be_read_are_skipped_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_folder(tmp_path, 1)
    (tmp_path / "lost+found").mkdir()
    listed = os.scandir

    def scandir(folder: str) -> Any:
        if Path(folder).name == "lost+found":
            raise PermissionError(13, "Permission denied", folder)
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    found, skipped = find_images(tmp_path)
    assert [len(found), skipped.count] == [1, 2]
    assert skipped.first.endswith("lost+found")


def test_hidden_and_other_files_are_skipped_with_a_warning(tmp_path: Path) -> None:
    image_folder(tmp_path, 3)
    (tmp_path / "metadata.jsonl").rename(tmp_path / "notes.txt")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("._0.png", ".ipynb_checkpoints/0.png", "broken.png"):
        (tmp_path / name).write_bytes(b"not an image")
    (tmp_path / "3.jfif").write_bytes((tmp_path / "0.png").read_bytes())
    with pytest.warns(UserWarning, match=r"skipped 4 non-images, for example .*\._0\.png"):
        source = FolderSource(tmp_path, caption_column=None)
    assert [Path(source[i].name).name for i in range(len(source))] == ["0.png", "1.png", "2.png", "3.jfif"]


def test_metadata_in_hidden_folders_is_not_read(tmp_path: Path) -> None:
    image_folder(tmp_path / "a", 2)
    image_folder(tmp_path / ".ipynb_checkpoints", 2)
    assert len(FolderSource(tmp_path)) == 2


def test_metadata_may_be_comma_separated(tmp_path: Path) -> None:
    image_folder(tmp_path, 3)
    (tmp_path / "metadata.jsonl").unlink()
    lines = ['\ufeff"file_name","text"', '1.png,"a, ""b""\nand c"', "", "0.png,ä", '"2.png",']
    (tmp_path / "metadata.csv").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    source = pickle.loads(pickle.dumps(FolderSource(tmp_path)))
    read = [(Path(source[i].name).name, source[i].captions) for i in (2, 0, 1)]
    assert read == [("2.png", ("",)), ("1.png", ('a, "b"\nand c',)), ("0.png", ("ä",))]
    for text, message in [
        ("file_name,text\n0.png\n", r"metadata.csv:2: 1 values for the columns file_name, text"),
        ("file,text\n0.png,a\n", r'metadata.csv:2: needs a "file_name"'),
        ("file_name\n0.png\n", r"metadata.csv:2: no column 'text'"),
        ('file_name,text\n0.png,"a\n', r"metadata.csv:\d: not comma-separated values"),
        ("file_name,text,text\n0.png,a,b\n", r"metadata.csv: several columns have the name 'text'"),
        ("file_name,text\n", r"metadata.csv is empty"),
        ("", r"metadata.csv is empty"),
    ]:
        (tmp_path / "metadata.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            FolderSource(tmp_path)
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\n0.png,\xff\n")
    with pytest.raises(ValueError, match="in UTF-8"):
        FolderSource(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"has both metadata.jsonl and metadata.csv; keep one"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "/secret.png", "absolute"])
def test_a_file_name_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    image_folder(tmp_path / "data", 1)
    flat_image(1).save(tmp_path / "secret.png")
    name = str(tmp_path / "secret.png") if name == "absolute" else name
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}))
    with pytest.raises(ValueError, match=r"metadata.jsonl:1: file_name '.*secret.png' leaves the folder"):
        FolderSource(tmp_path / "data")


def test_a_file_name_may_go_through_the_folder(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", 1)
    (tmp_path / "images" / "metadata.jsonl").unlink()
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "metadata.jsonl").write_text(json.dumps({"file_name": "../images/0.png", "text": "a"}))
    assert FolderSource(tmp_path)[0].captions == ("a",)


def test_a_missing_folder_is_called_missing(tmp_path: Path) -> None:
    for column in ("text", None):
        with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
            FolderSource(tmp_path / "nowhere", column)


def test_shards_report_skipped_samples_and_know_all_suffixes(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.jfif", "0.txt", "._0.jfif", "1.txt", "1.heic"):
            info = tarfile.TarInfo(name)
            info.size = len(content := png(flat_image(5)))
            tar.addfile(info, io.BytesIO(content))
    with pytest.warns(UserWarning, match=r"skipped 1 non-images, for example 1 in .*a\.tar"):
        assert len(TarSource([tmp_path / "a.tar"], None)) == 1


def test_missing_and_empty_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--train_data_dir needs one line per image"):
        FolderSource(tmp_path)
    with pytest.raises(FileNotFoundError, match="no images"):
        FolderSource(tmp_path, caption_column=None)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        FolderSource(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a"}')
    with pytest.raises(FileNotFoundError, match=r"metadata.jsonl:1: .*gone.png does not exist"):
        FolderSource(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "exactly one of --train_data_dir, --dataset_name, --train_shards; got none"),
        (["--train_data_dir", "a", "--dataset_name", "b"], "got --train_data_dir and --dataset_name"),
        (["--train_data_dir", "a", "--streaming"], "--streaming reads --dataset_name"),
        (["--dataset_name", "a", "--load_from_disk"], "--load_from_disk reads the folder --train_data_dir"),
        (["--train_data_dir", "a", "--dataset_config_name", "b"], "--dataset_config_name needs --dataset_name"),
        (["--train_data_dir", "a", "--cache_latents", "--random_flip"], "leave out --random_flip"),
        (["--dataset_name", "a", "--streaming", "--cache_latents"], "has to see all images"),
        (["--train_data_dir", "a", "--aspect_ratio_buckets", "--resolution", "10"], "--bucket_step 64 must divide"),
    ],
)
def test_impossible_flags_are_refused(line: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source_from(flags(*line))


def test_missing_columns_are_named_with_those_that_there_are(tmp_path: Path) -> None:
    line = saved(tmp_path)
    for flag in ("--image_column", "--caption_column"):
        with pytest.raises(ValueError, match=rf"{flag} 'gone': the data set has the columns \['image', 'text'\]"):
            source_from(flags(*line, flag, "gone"))
    table(2, label=[1, 2]).save_to_disk(tmp_path / "b")
    with pytest.raises(ValueError, match="'label' must hold texts or lists of texts"):
        source_from(flags("--load_from_disk", "--train_data_dir", str(tmp_path / "b"), "--caption_column", "label"))
    source = source_from(flags("--load_from_disk", "--train_data_dir", str(tmp_path / "b"), "--image_column", "label",
                               "--caption_column", "text"))  # fmt: skip
    with pytest.raises(ValueError, match="'label' is not an image file but int"):
        source[0]


def test_missing_splits_are_named(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict(test=table(2)).save_to_disk(tmp_path / "a")
    with pytest.raises(ValueError, match=r"has no split 'train'; it has \['test'\]"):
        source_from(flags("--load_from_disk", "--train_data_dir", str(tmp_path / "a")))


def test_a_batch_larger_than_the_data_set(tmp_path: Path) -> None:
    data = flags("--train_data_dir", str(image_folder(tmp_path, 6)))
    with pytest.raises(ValueError, match=r"takes 8 examples \(--train_batch_size 1 on 8 devices.* the data set has 6"):
        batches_from(data, per_device(1), make_mesh(data=8), finish)


def test_bad_shards(tmp_path: Path) -> None:
    find = lambda name: source_from(flags("--train_shards", str(tmp_path / name)))
    with pytest.raises(FileNotFoundError, match=r"no file .*a-1.tar"):
        find("a-{1..2}.tar")
    (tmp_path / "a.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(ValueError, match="a.tar is not an uncompressed tar file"):
        find("a.tar")
    (tmp_path / "a.zip").touch()
    with pytest.raises(ValueError, match="must name .tar files"):
        find("a.zip")
    with tarfile.open(tmp_path / "b.tar", "w") as shard:
        shard.add(image_folder(tmp_path / "c", 1) / "0.png", "deep/0.png")
    with pytest.raises(ValueError, match="deep/0 has no caption"):
        find("b.tar")
    write_array_record(tmp_path / "d.array_record", [("0.png", b"", 3)])
    with pytest.raises(ValueError, match="'text' must be a text"):
        find("d.array_record")[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("0.txt", b"caf\xe9", "the caption is not UTF-8"),
        ("0.json", b'{"text": ', "its .json is not JSON"),
        ("0.json", b'["a"]', "its .json must be an object"),
    ],
)
def test_captions_of_shards_that_cannot_be_read_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "0.png").write_bytes(png(flat_image(0)))
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for file in ("0.png", name):
            shard.add(tmp_path / file, f"deep/{file}")
    source = source_from(flags("--train_shards", str(tmp_path / "a.tar")))
    with pytest.raises(ValueError, match=rf"deep/0 in .*a\.tar: {message}"):
        source[0]


def test_a_damaged_head_of_a_tar_loses_no_sample_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, rows(range(10)))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        heads = [member.offset for member in tar]
    dice = random.Random(0)
    for head in heads:
        for _ in range(8):
            damaged = bytearray(whole)
            damaged[head + dice.randrange(512)] ^= 1 << dice.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"a\.tar"):
                TarSource([path])
    path.write_bytes(damaged[: heads[3]] + b"\1" + damaged[heads[3] + 1 :])
    with pytest.raises(ValueError, match=r"a\.tar is damaged.* follows 2 samples, at byte"):
        TarSource([path])


def test_a_tar_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, rows(range(4)))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        end = [member.offset_data + -(-member.size // 512) * 512 for member in tar][-1]
    for size in (*range(512, end, 700), end):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.tar (is truncated|is damaged|is not an uncompressed tar)"):
            TarSource([path])
    path.write_bytes(whole[: end + 1024])
    assert len(TarSource([path])) == 4, "the end is two blocks of zeros; what fills up a record may be absent"
    path.write_bytes(whole + whole)
    with pytest.raises(ValueError, match="several archives in one file"):
        TarSource([path])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.REGTYPE])
def test_members_that_would_be_lost_are_refused(kind: bytes, tmp_path: Path) -> None:
    """Links have no contents; a second member of the same name would replace the first."""
    path = tmp_path / "a.tar"
    write_tar(path, rows(range(2)))
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(tar.getnames()[0] if kind == tarfile.REGTYPE else "9.png")
        info.type, info.linkname = kind, "" if kind == tarfile.REGTYPE else tar.getnames()[0]
        tar.addfile(info)
    with pytest.raises(ValueError, match="twice" if kind == tarfile.REGTYPE else "is a link"):
        TarSource([path])
