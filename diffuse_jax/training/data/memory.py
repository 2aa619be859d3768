"""Captioned pictures from a folder, and batches that are a pure function of the seed and the step.

Because nothing but ``(seed, step)`` decides what a batch holds, a resumed run sees exactly the batches that the
uninterrupted one would have seen.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

ORDER, CROP, CAPTION = range(3)
"""What a stream of random numbers is for; part of its seed, so that the streams are independent."""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures in memory, uint8 ``[H,W,3]`` each with its shorter side at the wanted size, and their captions."""

    images: Sequence[np.ndarray]
    captions: Sequence[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.images)


def read_pictures(folder: str | Path, resolution: int, caption_column: str | None = "text") -> Pictures:
    """Read an image folder: ``metadata.jsonl`` with ``file_name`` and a caption (or list of captions) per line.

    Args:
      folder: where ``metadata.jsonl`` and the pictures lie.
      resolution: the shorter side is resized to this (bilinear).
      caption_column: key of the caption; None where captions are not needed. Then ``metadata.jsonl`` may be missing:
        all pictures in the folder and below are read, by name.

    Raises:
      FileNotFoundError: no ``metadata.jsonl``, or a picture that it names is missing, or there are no pictures.
      ValueError: a line without the column, a caption that is not text, or no lines at all.
    """
    path = Path(folder) / "metadata.jsonl"
    if caption_column is None and not path.is_file():
        files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
        if not files:
            raise FileNotFoundError(f"no pictures ({', '.join(PICTURE_SUFFIXES)}) in {folder}")
        return Pictures([_read(file, resolution) for file in files], [("",)] * len(files))
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; --train_data_dir needs one line per picture there: "
                                '{"file_name": "a.png", "text": "a caption"}')  # fmt: skip
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty")
    captions = [_captions(line, caption_column, f"{path}:{n}") for n, line in enumerate(lines, 1)]
    return Pictures([_read(Path(folder) / line["file_name"], resolution) for line in lines], captions)


def _captions(line: dict[str, object], column: str | None, where: str) -> tuple[str, ...]:
    if column is None:
        return ("",)
    if column not in line:
        raise ValueError(f"{where}: no column {column!r} (--caption_column); it has {sorted(line)}")
    value = line[column]
    texts = tuple(value) if isinstance(value, list) else (value,)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: {column!r} must be a text or a list of texts, got {value!r}")
    return texts


def _read(path: Path, resolution: int) -> np.ndarray:
    with Image.open(path) as file:
        picture = file.convert("RGB")
    scale = resolution / min(picture.size)
    size = max(resolution, round(picture.width * scale)), max(resolution, round(picture.height * scale))
    return np.asarray(picture if size == picture.size else picture.resize(size, Image.Resampling.BILINEAR))


def batch_indices(seed: int, step: int, batch_size: int, total: int) -> np.ndarray:
    """Which pictures batch ``step`` holds, ``[batch_size]``: every epoch visits each picture once, in a new order.

    The stream of epochs is cut into batches without gaps, so no picture is dropped where an epoch ends.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([_epoch_order(seed, int(p) // total, total)[int(p) % total] for p in positions])


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, total: int) -> np.ndarray:
    return np.random.default_rng([seed, ORDER, epoch]).permutation(total)


def pixel_batch(
    images: Sequence[np.ndarray], size: int, seed: int, step: int, *, center_crop: bool = False, flip: bool = False
) -> np.ndarray:
    """Cut squares of ``size`` out of uint8 pictures: float32 ``[B,size,size,3]`` in [-1, 1].

    The place of the square and the mirroring (``flip``, half of the pictures) depend on ``(seed, step)`` only.
    """
    rng = np.random.default_rng([seed, CROP, step])
    squares = []
    for image in images:
        u, v, mirrored = rng.random(3)
        if center_crop:
            u = v = 0.5
        top, left = int(u * (image.shape[0] - size + 1)), int(v * (image.shape[1] - size + 1))
        square = image[top : top + size, left : left + size]
        squares.append(square[:, ::-1] if flip and mirrored < 0.5 else square)
    return np.stack(squares).astype(np.float32) / 127.5 - 1.0


def caption_batch(captions: Sequence[tuple[str, ...]], seed: int, step: int, empty_share: float = 0.0) -> list[str]:
    """One of each picture's captions at random; a share of them is "", which guidance needs to compare with."""
    rng = np.random.default_rng([seed, CAPTION, step])
    draws = rng.random((len(captions), 2))
    return [
        "" if dropped < empty_share else texts[int(which * len(texts))]
        for texts, (which, dropped) in zip(captions, draws, strict=True)
    ]
