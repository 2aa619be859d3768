"""Sheets of the gallery from trained networks, and the measure of edits, with a tiny model and invented drawings."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.emoji_edits import distances, held_out_edits, style_of
from diffuse_jax import DiffusionPipeline
from diffuse_jax.adapters import custom_diffusion, tokens
from diffuse_jax.training.editing import with_image_channels
from tests.train.latent_models import SIZE, save_sd

pytestmark = pytest.mark.filterwarnings("ignore:the prompt is .* too long")  # the tiny model reads 16 tokens
DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def parts() -> Iterator[Any]:
    """The module of the parts, which samples with two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        module = importlib.import_module("gallery_tasks")
        patch.setitem(module.SETTINGS, "num_inference_steps", 2)
        yield module


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(save_sd(tmp_path_factory.mktemp("sd"), fresh=False))


def test_headings_stay_above_their_own_column(parts: Any) -> None:
    """Nothing is written over the gap between two columns, however long the headings are."""
    sheets = importlib.import_module("gallery_sheets")
    white = np.ones((8, 8, 3), np.float32)
    for headings in (["sun", "moon"], ["red apple", "beaming face with smiling eyes"]):
        page = np.asarray(sheets.draw(sheets.Sheet([[white, white]], ["row"], headings)))
        gap = sheets.LEFT + sheets.EDGE + np.arange(sheets.GAP)
        assert (page[:, gap] == 255).all(), headings
        assert (page[: sheets.TOP, sheets.LEFT :] < 128).any(), "they are written"


def edits_in(folder: Path) -> Path:
    """A folder of held-out edits as ``make_edits.py`` writes it: seven results, each from two images."""
    lines = []
    for kind, value in (("blob", 0), ("twemoji", 51), ("noto", 255)):
        (folder / "heldout" / kind).mkdir(parents=True)
        for n in range(7):
            Image.new("RGB", (SIZE, SIZE), (value,) * 3).save(folder / "heldout" / kind / f"{n}.png")
    for n in range(7):
        for kind in ("blob", "twemoji"):
            names = {"file_name": f"noto/{n}.png", "input_image_file_name": f"{kind}/{n}.png"}
            lines.append(names | {"edit_prompt": "make it noto style", "label": f"thing {n}"})
    (folder / "heldout" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_each_held_out_drawing_is_edited_to_once(tmp_path: Path) -> None:
    """No drawing counts twice, and the same edits are chosen whatever their number."""
    folder = edits_in(tmp_path)
    every = held_out_edits(folder, 64)
    assert sorted(edit.label for edit in every) == [f"thing {n}" for n in range(7)]
    assert [edit.label for edit in held_out_edits(folder, 3)] == [edit.label for edit in every[:3]]
    assert all(edit.after.min() == 1 and edit.before.max() < 0.5 for edit in every)
    assert {style_of(edit.instruction) for edit in every} == {"noto"}


def test_distances_are_of_pixels_and_of_one_image_each() -> None:
    """One sample is the result itself and one the image before: 0 and all of the distance, not nearer than itself."""
    befores, afters = np.zeros((2, 4, 4, 3)), np.full((2, 4, 4, 3), 0.2)
    found = distances(befores, afters, np.stack([afters[0], befores[1]]))
    assert found["rmse"]["value"] == pytest.approx(255 * 0.1)
    assert found["rmse"]["interval"] == pytest.approx([0, 255 * 0.2])
    assert found["nearer"]["value"] == 0.5
    assert found["count"] == 2


def test_the_sheet_of_edits_begins_with_what_is_edited(parts: Any, pipe: DiffusionPipeline, tmp_path: Path) -> None:
    """A row is the image before, three edits and the true one; the editor sees the image."""
    with_image_channels(pipe).save_pretrained(tmp_path / "instruct-pix2pix")
    args = argparse.Namespace(trained=tmp_path, edits_dir=edits_in(tmp_path / "edits"))
    sheet = parts.edits(pipe, args)
    wanted = held_out_edits(args.edits_dir, 6)
    assert list(sheet.beside) == [edit.label for edit in wanted]
    for row, edit in zip(sheet.rows, wanted, strict=True):
        assert len(row) == len(sheet.above) == 5
        assert np.array_equal(row[0], edit.before)
        assert np.array_equal(row[-1], edit.after)
        assert len({image.tobytes() for image in row[1:-1]}) == 3  # other noise


def test_the_sheet_of_a_new_word_has_its_prompts_with_and_without(
    parts: Any, pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    """With unchanged attention, a word that means nothing new changes prompts that have it, and no others."""
    folder = tmp_path / "custom-diffusion"
    leaves = custom_diffusion.leaves_of(pipe.params["unet"], "crossattn_kv")
    unet = pipe.components["unet"].shapes()
    custom_diffusion.save_leaves(folder / "pytorch_custom_diffusion_weights.safetensors", leaves, unet)
    table = np.asarray(tokens.table_of(pipe.params["text_encoder"]))
    tokens.save_rows(folder / "<new1>.safetensors", "<new1>", table[5:6])
    (tmp_path / "character").mkdir()
    for n in range(8):
        Image.new("RGB", (SIZE, SIZE), (n, 0, 0)).save(tmp_path / "character" / f"{n}.png")
    sheet = parts.custom(pipe, argparse.Namespace(trained=tmp_path, examples_dir=tmp_path))
    for n, (prompt, row) in enumerate(zip(sheet.beside, sheet.rows, strict=True)):
        example, before, after = row[0], np.stack(row[1:3]), np.stack(row[3:])
        assert round(float(example[0, 0, 0] * 255)) == n
        assert len(sheet.above) == len(row) == 5
        changed = np.abs(before - after).max(axis=(1, 2, 3))
        assert (changed > 1e-4).all() if "<new1>" in prompt else (changed < 1e-5).all(), prompt
