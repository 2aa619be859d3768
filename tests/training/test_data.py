"""Reading image folders, and batches as a function of seed and step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffuse_jax.training.data import batch_indices, caption_batch, pixel_batch, read_pictures


def write(folder: Path, *lines: dict[str, object]) -> Path:
    for i, line in enumerate(lines):
        pixels = np.full((6 + 2 * i, 8, 3), 40 * i, np.uint8)
        Image.fromarray(pixels).save(folder / str(line["file_name"]))
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def test_pictures_are_scaled_to_the_shorter_side_and_captions_may_be_lists(tmp_path: Path) -> None:
    write(tmp_path, {"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": ["two", "2"]})
    pictures = read_pictures(tmp_path, resolution=12)
    assert [image.shape for image in pictures.images] == [(12, 16, 3), (12, 12, 3)]
    assert pictures.captions == [("one",), ("two", "2")]
    np.testing.assert_array_equal(pictures.images[1], 40)


@pytest.mark.parametrize(
    ("line", "message"),
    [({"file_name": "a.png"}, "no column 'text'"), ({"file_name": "a.png", "text": 3}, "must be a text"),
     ({"file_name": "a.png", "text": []}, "must be a text")],
)  # fmt: skip
def test_bad_captions_name_the_line(tmp_path: Path, line: dict[str, object], message: str) -> None:
    write(tmp_path, line)
    with pytest.raises(ValueError, match=rf"metadata.jsonl:1: .*{message}"):
        read_pictures(tmp_path, 8)
    assert read_pictures(tmp_path, 8, caption_column=None).captions == [("",)]


def test_missing_and_empty_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--train_data_dir"):
        read_pictures(tmp_path, 8)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_pictures(tmp_path, 8)


@pytest.mark.parametrize(("size", "total"), [(4, 10), (16, 5)])
def test_every_epoch_visits_each_picture_once(size: int, total: int) -> None:
    stream = np.concatenate([batch_indices(0, n, size, total) for n in range(20)])
    epochs = stream[: len(stream) // total * total].reshape(-1, total)
    np.testing.assert_array_equal(np.sort(epochs), np.broadcast_to(np.arange(total), epochs.shape))
    assert any(tuple(epochs[0]) != tuple(epoch) for epoch in epochs)
    np.testing.assert_array_equal(batch_indices(0, 7, size, total), stream[7 * size : 8 * size])
    assert any(tuple(batch_indices(1, n, size, total)) != tuple(batch_indices(0, n, size, total)) for n in range(5))


def test_squares_come_from_the_picture(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (9, 12, 3), np.uint8)
    middle = pixel_batch([image], 9, 0, 0, center_crop=True)
    np.testing.assert_allclose(middle[0], image[:, 2:11] / 127.5 - 1, atol=1e-6)
    squares = pixel_batch([image] * 40, 5, seed=0, step=0, flip=True)
    windows = np.lib.stride_tricks.sliding_window_view(image / 127.5 - 1, (5, 5, 3)).reshape(-1, 5, 5, 3)
    found = [max(np.isclose(windows, s, atol=1e-6).all((1, 2, 3)).any() for s in (q, q[:, ::-1])) for q in squares]
    assert all(found)
    assert len({q.tobytes() for q in squares}) > 20
    np.testing.assert_array_equal(squares, pixel_batch([image] * 40, 5, seed=0, step=0, flip=True))
    assert squares.dtype == np.float32


def test_share_of_empty_captions() -> None:
    drawn = [text for n in range(50) for text in caption_batch([("a", "b")] * 40, 3, n, empty_share=0.1)]
    shares = {text: drawn.count(text) / len(drawn) for text in ("", "a", "b")}
    assert shares == pytest.approx({"": 0.1, "a": 0.45, "b": 0.45}, abs=0.03)
    assert "" not in caption_batch([("a",)] * 100, 3, 0)
    assert set(caption_batch([("a",)] * 100, 3, 0, empty_share=1.0)) == {""}
