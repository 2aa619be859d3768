"""Masks of training images, from their column to the weights of latents in a batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.train.helpers import EMOJI, run
from tests.train.latent_models import SIZE, save_sd
from tests.train.test_latent import flags, loaded

LATENTS = SIZE // 2
LEFT = np.where(np.arange(LATENTS) < LATENTS // 2, 1.0, 0.0) * np.ones((LATENTS, 1))
"""The weights of latents if the left half of the image counts."""


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder with masks whose left half is white."""
    folder = tmp_path_factory.mktemp("masked") / "data"
    shutil.copytree(EMOJI, folder)
    lines = [json.loads(line) for line in (EMOJI / "metadata.jsonl").read_text().splitlines()]
    (folder / "masks").mkdir()
    for line in lines:
        width, height = Image.open(folder / line["file_name"]).size
        mask = np.zeros((height, width), np.uint8)
        mask[:, : width // 2] = 255
        line["mask"] = f"masks/{line['file_name']}"
        Image.fromarray(mask).save(folder / line["mask"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def first_batch(monkeypatch: pytest.MonkeyPatch, script: str, **options: Any) -> dict[str, np.ndarray]:
    options["image_interpolation_mode"] = "nearest"  # the borders of masks stay sharp
    batches = loaded(monkeypatch, script, **options)["batches"]
    batch = next(batches)
    getattr(batches, "close", lambda: None)()
    return batch


@pytest.mark.parametrize("more", [{}, {"cache_latents": True}, {"random_flip": True}], ids=str)
def test_masks_of_text_to_image(
    more: dict[str, Any], sd: Path, masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = flags(sd, tmp_path, train_data_dir=masked, mask_column="mask", max_train_steps=1, **more)
    masks = first_batch(monkeypatch, "text_to_image.py", **options)["loss_mask"]
    assert masks.shape == (8, LATENTS, LATENTS)
    assert masks.dtype == np.float32
    ways = {mask.tobytes() for mask in masks}
    expected = [LEFT, LEFT[:, ::-1]] if more == {"random_flip": True} else [LEFT]
    assert ways == {np.ascontiguousarray(mask, np.float32).tobytes() for mask in expected}


def test_masks_of_dreambooth_are_those_of_the_instance(
    sd: Path, masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"instance_data_dir": masked, "instance_prompt": "a", "with_prior_preservation": True,
               "class_data_dir": EMOJI, "class_prompt": "b", "num_class_images": 12, "mask_column": "mask"}  # fmt: skip
    batch = first_batch(
        monkeypatch, "dreambooth.py", **flags(sd, tmp_path, max_train_steps=1, train_batch_size=2, **options)
    )
    assert batch["prior"].tolist() == [False, True, False, True]
    wanted = [np.ones_like(LEFT) if prior else LEFT for prior in batch["prior"]]
    np.testing.assert_array_equal(batch["loss_mask"], wanted)
    del options["mask_column"]
    options["instance_data_dir"] = EMOJI
    assert "loss_mask" not in first_batch(
        monkeypatch, "dreambooth.py", **flags(sd, tmp_path / "plain", max_train_steps=1, train_batch_size=2, **options)
    )


def test_a_missing_column_of_masks_is_an_error(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = flags(sd, tmp_path / "out", train_data_dir=EMOJI, mask_column="mask", max_train_steps=1)
    with pytest.raises(ValueError, match=r"metadata.jsonl:1: no mask under 'mask' \(--mask_column\)"):
        run(monkeypatch, "text_to_image.py", **options)
    assert not (tmp_path / "out").exists()
