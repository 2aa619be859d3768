"""Images of random size: on a canvas or enlarged, with prompts that say so and masks that leave the canvas out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from diffuse_jax.training.cached import mask_of
from diffuse_jax.training.data import Example, Record, Transform
from diffuse_jax.training.data.rescaling import CLOSE_UP, FAR_AWAY, GREY, Rescaled, placed

from .data_sets import png

CELL = 8


@pytest.fixture(scope="module")
def record() -> Record:
    """A picture without grey, of another form than a square."""
    pixels = np.random.default_rng(0).integers(200, 256, (120, 150, 3), np.uint8)
    return Record(png(Image.fromarray(pixels)), ("a cat",), "a.png")


@pytest.mark.parametrize("size", [None, (96, 128)])
def test_sizes_prompts_and_masks_belong_together(record: Record, size: tuple[int, int] | None) -> None:
    transform = Rescaled(Transform(96, random_flip=True), CELL)
    canvas, seen = size or (96, 96), Counter()
    for position in range(150):
        example = transform(record, 0, position, size)
        assert example.pixels is not None
        assert example.mask is not None
        assert example.pixels.shape == (*canvas, 3)
        assert example.target_size == canvas
        prefix = example.caption.removesuffix("a cat")
        covered = (example.pixels != GREY).all(-1)
        rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
        factor = len(rows) / canvas[0]
        assert covered[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert abs(len(columns) / canvas[1] - factor) < 2 / canvas[0]
        seen["enlarged" if prefix in CLOSE_UP else "far" if prefix in FAR_AWAY else "smaller"] += 1
        assert (prefix in CLOSE_UP) == covered.all()
        if factor < 1:
            assert (prefix in FAR_AWAY) == (factor < 0.6) or abs(factor - 0.6) < 2 / canvas[0]
            assert 1 / 3 - 2 / canvas[0] < factor
            cells = mask_of(CELL, example)
            assert set(np.unique(cells)) == {0, 1}, "only whole latents count"
            for row, column in np.argwhere(cells):
                assert row > 0 < column
                around = covered[(row - 1) * CELL : (row + 2) * CELL, (column - 1) * CELL : (column + 2) * CELL]
                assert around.all(), "nor do those at the border of the image"
        else:
            assert (example.mask == 255).all()
        again = transform(record, 0, position, size)
        assert np.array_equal(again.pixels, example.pixels)
        assert again.caption == example.caption
    assert 0.5 < (seen["smaller"] + seen["far"]) / 150 < 0.8, "two thirds are made smaller"
    assert min(seen.values()) > 20
    plain = transform.fixed(record, 0, size)
    assert plain.mask is None
    assert plain.caption == "a cat"


def test_an_image_is_on_the_canvas_where_it_was_put() -> None:
    image = np.full((32, 32, 3), 9, np.uint8)
    pixels, mask = placed(image, (64, 64), (8, 20), CELL)
    assert (pixels[8:40, 20:52] == 9).all()
    assert (pixels != GREY).sum() == image.size
    expected = np.zeros((64, 64), np.uint8)
    expected[16:32, 32:40] = 255
    np.testing.assert_array_equal(mask, expected)
    larger = np.arange(80 * 80 * 3).reshape(80, 80, 3).astype(np.uint8)
    pixels, mask = placed(larger, (64, 64), (3, 16), CELL)
    np.testing.assert_array_equal(pixels, larger[3:67, 16:80])
    assert (mask == 255).all()


def test_small_canvases_keep_something_that_counts(record: Record) -> None:
    transform = Rescaled(Transform(16), 2)
    assert all(mask_of(2, transform(record, 0, position)).any() for position in range(60))
    assert all(mask_of(CELL, Rescaled(Transform(16), CELL)(record, 0, position)).any() for position in range(9))


def test_a_mask_is_averaged_over_each_latent() -> None:
    mask = np.zeros((4, 6), np.uint8)
    mask[:2, :2], mask[2, 2] = 255, 51
    example = Example(None, "", (4, 6), (0, 0), (4, 6), 0, 0, "", mask=mask)
    np.testing.assert_allclose(mask_of(2, example), [[1, 0, 0], [0, 0.05, 0]], rtol=1e-6)
    np.testing.assert_array_equal(mask_of(2, Example(None, "", (4, 6), (0, 0), (4, 6), 0, 0, "")), np.ones((2, 3)))
