"""How the emoji set is made: captions, held-out pairs, drawing, tokenizer and model card."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from diffuse_jax.training.data import FolderSource
from diffuse_jax.training.rewards import check_reward, jpeg_sizes, reward_from
from diffuse_jax.training.settings import RewardSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """Scripts import their neighbours by name, as Python does when one is run."""
    sys.path.insert(0, str(ROOT / "train" / "emoji"))
    yield
    sys.path.remove(str(ROOT / "train" / "emoji"))


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def record(label: str, style: str) -> dict[str, object]:
    return {"label": label, "style": style, "tags": ["red", "fruit", "round"], "group": "food & drink"}


def test_captions_name_concept_and_style() -> None:
    texts = script("captions").captions(record("red apple", "noto"))
    assert texts[0] == "red apple, noto style"
    assert "a red apple, noto style" in texts
    assert "red apple, fruit, round, noto style" in texts  # tags that repeat the name are left out
    assert "an orange, blob style" in script("captions").captions(record("orange", "blob"))
    assert all("red apple" in text for text in texts)


def test_held_out_concepts_stay_in_training_in_another_style() -> None:
    records = [record(f"thing {i}", style) for i in range(400) for style in ("noto", "blob", "fluent", "twemoji")]
    out = script("captions").held_out(records)
    assert np.mean(out) == pytest.approx(0.1, abs=0.02)
    kept = {r["label"] for r, held in zip(records, out, strict=True) if not held}
    assert kept == {r["label"] for r in records}
    backwards = script("captions").held_out(records[::-1])
    assert backwards[::-1] == out


def test_a_concept_in_one_style_is_never_held_out() -> None:
    assert not any(script("captions").held_out([record(f"thing {i}", "noto") for i in range(100)]))


def test_dataset_folders_refer_to_existing_images(tmp_path: Path) -> None:
    from PIL import Image

    make, common = script("make_dataset"), script("captions").is_common
    records = [record("red apple", style) for style in ("noto", "blob")] + [record("plate of red apples", "noto")]
    lines = make.write_folder(tmp_path / "train", [(r, Image.new("RGB", (4, 4))) for r in records])
    assert [common(line) for line in lines] == [True, False, False]
    read = [json.loads(line) for line in (tmp_path / "train" / "metadata.jsonl").read_text().splitlines()]
    assert read == lines
    assert all((tmp_path / "train" / line["file_name"]).is_file() for line in read)
    for _ in range(2):  # what was there is replaced
        make.link_folder(tmp_path / "mixed", tmp_path / "train", lines + lines[:1])
    assert len(FolderSource(tmp_path / "mixed")) == 4, "a folder that trainers read"


def test_drawing_needs_its_package_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = script("make_dataset")
    monkeypatch.setattr(make.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["make_dataset", "--output_dir", str(tmp_path / "data")])
    monkeypatch.setattr(make, "package_files", lambda *args: pytest.fail("fetched"))
    with pytest.raises(SystemExit, match=r"resvg-py is needed .*pip install"):
        make.main()


def test_a_curve_goes_on_where_a_run_was_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that two logs have are the later one's; curves of which no log is given stay as they are."""
    logs = []
    for name, steps, loss in (("first", range(10, 110, 10), 1.0), ("second", range(60, 210, 10), 0.5)):
        lines = [{"step": s, "loss": loss, "mse": 2 * loss, "learning_rate": 1e-3, "grad_norm": 0.1} for s in steps]
        logs.append(tmp_path / f"{name}.jsonl")
        logs[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "curves.json"
    other = {"part": "autoencoder", "step": 3000, "loss": 0.1, "mse": 0.1, "learning_rate": 0.0}
    output.write_text(json.dumps({"rows": [other, {"part": "UNet", "step": 1}]}))
    monkeypatch.setattr(sys, "argv", ["log_summary", "--model", *map(str, logs), "--output", str(output)])
    script("log_summary").main()
    first, *rows = json.loads(output.read_text())["rows"]
    assert first == other
    assert {row["part"] for row in rows} == {"UNet"}
    assert [row["step"] for row in rows][-1] == 200
    assert len(rows) == 16
    assert {row["loss"] for row in rows if row["step"] < 60} == {1.0}
    assert {row["loss"] for row in rows if row["step"] >= 60} == {0.5}


def test_labels_match_icon_names() -> None:
    slug = script("make_dataset").slug
    assert [slug(s) for s in ("Piñata", "woman’s hat", "ON! arrow", "face in clouds")] == [
        "pinata", "womans-hat", "on-arrow", "face-in-clouds"]  # fmt: skip


def test_icons_are_drawn_on_white() -> None:
    pytest.importorskip("resvg_py")
    make = script("make_dataset")
    icons = {"width": 16, "height": 8, "icons": {"bar": {"body": '<path fill="#f00" d="M0 0h16v8H0z"/>'}}}
    assert make.svg(icons, "foo") is None
    pixels = np.asarray(make.draw(make.svg(icons, "bar"), 32))
    assert pixels.shape == (32, 32, 3)
    np.testing.assert_array_equal(pixels[16, 16], [255, 0, 0])
    np.testing.assert_array_equal(pixels[1, 16], [255, 255, 255])


def test_transformers_reads_the_tokenizer_as_written(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    make = script("make_tokenizer")
    texts = ["a red apple, noto style", "a red car, noto style", "red hat's pin"] * 3
    merges = make.learn_merges(texts, 40)
    assert merges[0] == ("e", "d</w>")  # nine times, as ("r", "e"); it sorts first
    tokenizer = CLIPTokenizer.from_pretrained(make.write_tokenizer(tmp_path, merges, 12))
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert len(tokenizer) == len(vocabulary) == 512 + len(merges) + 2
    ids = tokenizer("A  Red apple", padding="max_length", truncation=True).input_ids
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words[:3] == ["<|startoftext|>", "a</w>", "red</w>"]
    assert len(ids) == tokenizer.model_max_length == 12
    assert ids[-1] == tokenizer.pad_token_id == len(vocabulary) - 1
    assert tokenizer.decode(tokenizer("red façade 🍎").input_ids, skip_special_tokens=True) == "red façade 🍎"


def test_captions_of_a_sheet_are_folded_not_cut() -> None:
    sheets = script("sheets")
    assert sheets.folded("clockwise vertical arrows, noto style") == ["clockwise", "vertical arrows", "noto style"]
    tile = Image.new("RGB", (64, 64))
    short, long = (sheets.sheet([sheets.Row([tile], [text])]) for text in ("egg", "a very long name of a thing"))
    assert short.width == long.width == sheets.CELL
    assert long.height - short.height == sheets.LINE


def test_edits_lead_to_one_style_from_training_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are of the split and of the style; inputs show the same thing and are never held out."""
    data, edits = tmp_path / "data", script("make_edits")
    pixels = {"noto": 0, "twemoji": 80, "blob": 160}
    image = lambda style: Image.new("RGB", (8, 8), (pixels[style],) * 3)
    kept = [*(record("red apple", style) for style in pixels), record("pear", "twemoji")]
    out = [record("pear", "noto"), record("pear", "blob")]
    for split, records in (("train", kept), ("heldout", out)):
        script("make_dataset").write_folder(data / split, [(r, image(r["style"])) for r in records])
    command = ["make_edits.py", "--data_dir", str(data), "--output_dir", str(tmp_path / "edits"), "--styles", "noto"]
    monkeypatch.setattr(sys, "argv", command)
    edits.main()
    found = {}
    for split in ("train", "heldout"):
        folder = tmp_path / "edits" / split
        found[split] = edits.read_lines(folder)
        for line in found[split]:
            before, after = (
                np.asarray(Image.open(folder / line[key])) for key in ("input_image_file_name", "file_name")
            )
            assert before.max() > 0 == after.max()
            assert line["edit_prompt"] == "make it noto style"
    assert [line["input_image_file_name"] for line in found["train"]] == [
        "before/twemoji/red-apple.png", "before/blob/red-apple.png",
    ]  # fmt: skip
    assert [line["input_image_file_name"] for line in found["heldout"]] == ["before/twemoji/pear.png"]


@pytest.mark.parametrize(
    ("data", "output", "message"),
    [
        ("data", "data", "would replace the images of --data_dir"),
        ("data", "data/../data", "would replace the images of --data_dir"),
        ("none", "edits", "has no train/metadata.jsonl"),
    ],
)
def test_edits_refuse_folders_before_anything_is_written(
    data: str, output: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The folder of edits is replaced: it must not be that of the drawings."""
    for split in ("train", "heldout"):
        drawing = (record("pear", "noto"), Image.new("RGB", (8, 8)))
        script("make_dataset").write_folder(tmp_path / "data" / split, [drawing])
    files = lambda: sorted(tmp_path.rglob("*"))
    before = files()
    command = ["make_edits.py", "--data_dir", str(tmp_path / data), "--output_dir", str(tmp_path / output)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        script("make_edits").main()
    assert message in capsys.readouterr().err
    assert files() == before


def test_estimated_size_orders_images_as_jpeg_does() -> None:
    """Real drawings, and the same ones blurred more and more."""
    drawings = [Image.open(path).convert("RGB") for path in sorted((ROOT / "tests" / "data" / "emoji").glob("*.png"))]
    images = [d.filter(ImageFilter.GaussianBlur(radius)) for d in drawings for radius in (0, 0.5, 1, 3)]
    pixels = np.stack([np.asarray(image, np.float32) / 255 for image in images])
    estimated, size = -np.asarray(script("jpeg_reward").compressibility(pixels, None)), jpeg_sizes(pixels)
    assert np.corrcoef(estimated, size)[0, 1] > 0.97
    blank = np.ones((1, 64, 64, 3), np.float32)
    assert abs(float(script("jpeg_reward").compressibility(blank, None)[0])) < 1e-3
    with pytest.raises(ValueError, match="must be multiples of 16, got 64 and 72"):
        script("jpeg_reward").compressibility(np.zeros((1, 64, 72, 3), np.float32), None)


def test_estimated_size_is_a_reward_with_a_gradient() -> None:
    reward = reward_from(RewardSettings(reward=f"{ROOT}/train/emoji/jpeg_reward.py:compressibility", method="draft"))
    check_reward(reward, gradient=True, size=(32, 32), prompts=["red apple, noto style"])
