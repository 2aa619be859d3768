"""What ``fitting`` refuses; ``oracle/test_fitting.py`` compares its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffuse_jax.fitting import blur_mask, crop_region, extend, mask_for_queries, overlay, resize

SMALL, LARGE = Image.new("L", (4, 3), 255), Image.new("RGB", (8, 6))
BLACK = Image.new("L", (4, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resize(SMALL, 8, 8, "stretch"), "mode must be one of default, fill, crop, got 'stretch'"),
        (lambda: resize(SMALL, 8, 8, resample="box"), "resample must be one of lanczos, .* got 'box'"),
        (lambda: resize(SMALL, 0, 8), "at least 1x1 pixels, got 0x8"),
        (lambda: resize("a.png", 8, 8), "a PIL image or an array .* got str"),
        (lambda: resize(np.zeros(4), 8, 8), "got ndarray"),
        (lambda: resize(np.zeros((4, 4)), 8, 8, "crop"), "mode='crop' takes a PIL image, got an array"),
        (lambda: blur_mask(SMALL, -1), "factor must be at least 0"),
        (lambda: crop_region(BLACK, 8, 8), "the mask is black"),
        (lambda: crop_region(SMALL, 8, 8, -1), "pad at least 0, got 8x8 and -1"),
        (lambda: overlay(LARGE, SMALL, SMALL), "must be of one size without a region, got 8x6, 4x3, 4x3"),
        (lambda: overlay(SMALL, SMALL, LARGE, (0, 0, 4, 3)), "got 4x3, 4x3, 8x6"),
        (lambda: mask_for_queries(np.zeros((4, 4)), 4), r"got \(4, 4\) and 4"),
        (lambda: mask_for_queries(np.zeros((1, 4, 4)), 0), "and 0"),
    ],
)
def test_what_is_impossible_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_a_different_aspect_ratio_of_features_gives_a_warning() -> None:
    with pytest.warns(UserWarning, match="50 queries have another aspect ratio than the masks of 8x8 pixels"):
        mask_for_queries(np.ones((1, 8, 8)), 50)


def test_a_canvas_is_extended_and_masked_where_it_is_new() -> None:
    image = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))
    canvas, mask = extend(image, left=2, bottom=3, overlap=1)
    assert canvas.size == mask.size == (8, 7)
    known = np.asarray(mask) == 0
    assert known.sum() == 5 * 3, "one column and one row of the image are repainted"
    np.testing.assert_array_equal(np.asarray(canvas)[:4, 2:], np.asarray(image))
    np.testing.assert_array_equal(np.asarray(canvas)[0, :2], [np.asarray(image)[0, 0]] * 2)
    assert known[:3, 3:].all()


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({}, "at least one side"),
        ({"left": -1}, "no negative"),
        ({"left": 1, "overlap": 6}, "leaves nothing of an image of 6x4"),
    ],
)
def test_impossible_canvases_are_refused(sides: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extend(Image.new("RGB", (6, 4)), **sides)
