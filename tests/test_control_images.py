"""Control images: edges are those of OpenCV, and what comes out goes into a pipeline as it is."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffuse_jax.control_images import blur, canny, inpaint_condition, tile
from diffuse_jax.pipelines.inputs import pixels


def spots(height: int, width: int, grain: int) -> np.ndarray:
    """Coloured spots of about ``grain`` pixels with soft edges, uint8 ``[H,W,3]``, in integer arithmetic."""
    rng = np.random.default_rng(1000 * height + width)
    image = rng.integers(0, 256, (height // grain + 2, width // grain + 2, 3)).repeat(grain, 0).repeat(grain, 1)
    for axis in (0, 1):
        image = sum(np.roll(image, k, axis) for k in range(grain)) // grain
    return image[:height, :width].astype(np.uint8)


def crc(edges: np.ndarray) -> int:
    return zlib.crc32(np.packbits(edges > 0).tobytes())


CASES = {
    "usual thresholds": (61, 44, 3, 100, 200),
    "noise": (40, 70, 1, 50, 150),
    "large spots": (90, 77, 9, 20.7, 60.2),
    "thresholds the wrong way round": (50, 50, 4, 200, 100),
    "no thresholds": (33, 29, 5, 0, 0),
    "a row": (1, 64, 2, 50, 100),
    "a column": (64, 1, 2, 50, 100),
    "a pixel": (1, 1, 1, 0, 0),
}
"""Height, width, grain and the thresholds."""

OPENCV: dict[str, tuple[int, int]] = {
    "usual thresholds": (0xF0C12C1D, 0x3E5283BF),
    "noise": (0x449CF4AE, 0xFCA217F2),
    "large spots": (0xE0EDF9FE, 0x7E0F322B),
    "thresholds the wrong way round": (0xD92F770F, 0x5084D2C9),
    "no thresholds": (0x50C48B88, 0x6FB66C48),
    "a row": (0x805035B3, 0xA9E9B958),
    "a column": (0xA938C2C8, 0x149517C6),
    "a pixel": (0xD202EF8D, 0xD202EF8D),
}
"""Checksums of what ``cv2.Canny`` of OpenCV 4.12.0 finds in the colours, and in the red channel alone."""


@pytest.mark.parametrize("name", CASES)
def test_edges_are_those_of_opencv(name: str) -> None:
    height, width, grain, low, high = CASES[name]
    image = spots(height, width, grain)
    assert (crc(canny(image, low, high)[..., 0]), crc(canny(image[..., 0], low, high)[..., 0])) == OPENCV[name]


RINGS = """
...###....###...
.###........###.
.#.....##.....#.
##..###..###..##
#..##......##..#
#..#........#..#
...#..####..#...
..#...#..#...#..
..#...#..#...#..
...#..####..#...
#..#........#..#
#..##......##..#
##..###..###..##
.#.....##.....#.
.###........###.
...###....###...
"""
"""What OpenCV 4.12 finds in :func:`rings`."""


def rings() -> np.ndarray:
    y, x = np.mgrid[:16, :16] - 7.5
    return (127.5 + 127.5 * np.cos(np.hypot(x, y) * 0.9)).astype(np.uint8)


def test_edges_are_those_that_opencv_found() -> None:
    found = canny(rings(), 200, 300)
    assert found.shape == (16, 16, 3)
    assert "\n".join("".join(".#"[v // 255] for v in row) for row in found[..., 0]) == RINGS.strip()


def test_weak_edges_stay_only_beside_strong_ones() -> None:
    image = np.zeros((20, 40), np.uint8)
    image[:, 10:] = np.linspace(10, 90, 20).astype(np.uint8)[:, None]  # an edge that gets stronger downwards
    image[:, 30:] += 20  # one that is weak everywhere
    edges = canny(image, 50, 300)[..., 0] > 0
    assert edges[:, 9:11].any(1).sum() > 15
    assert not edges[:, 25:].any()
    assert not canny(np.full((5, 5), 9, np.uint8)).any()


def test_blur_and_tile_change_details_and_size() -> None:
    image = Image.fromarray(spots(30, 50, 1))
    soft = blur(image, 3)
    assert soft.shape == (30, 50, 3)
    assert soft.std() < 0.5 * np.asarray(image).std()
    np.testing.assert_array_equal(blur(image, 0), np.asarray(image))
    assert tile(image, 96, 32).shape == (96, 160, 3)
    assert tile(image).shape == (1024, 1728, 3), "rounded to a multiple of 64"
    with pytest.raises(ValueError, match="resolution=32 must be at least multiple=64"):
        tile(image, 32)


@pytest.mark.parametrize("kind", [np.asarray, Image.fromarray], ids=["array", "PIL"])
def test_masked_pixels_are_minus_one_and_pipelines_take_them(kind: Any) -> None:
    image, mask = spots(8, 12, 2), np.zeros((8, 12), np.uint8)
    mask[2:5, 3:] = 255
    mask[6] = 127  # less than one half
    condition = inpaint_condition(kind(image), kind(mask))
    np.testing.assert_array_equal(condition[mask == 255], -1)
    np.testing.assert_array_equal(condition[mask != 255], np.float32(image[mask != 255]) / 255)
    np.testing.assert_array_equal(pixels(condition, (8, 12), "control image", holes=True)[0], condition)
    with pytest.raises(ValueError, match="must have the same size, got 12x8 and 8x12"):
        inpaint_condition(kind(image), kind(mask.T.copy()))
    for wrong, holes in ((condition, False), (condition - 0.5, True)):
        with pytest.raises(ValueError, match="must be uint8, or floating.point in"):
            pixels(wrong, (8, 12), "image", holes=holes)
