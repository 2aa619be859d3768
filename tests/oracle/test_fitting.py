"""Resize modes, crop regions, blurred masks and overlays against diffusers' image processor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffuse_jax import fitting, utils
from diffuse_jax.pipelines.inputs import mask_pixels

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SIZES = st.integers(1, 70)
THEIRS = {name: diffusers.image_processor.VaeImageProcessor(resample=name) for name in fitting.RESAMPLE}
LANCZOS = THEIRS["lanczos"]


def noisy_image(height: int, width: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(height * 100 + width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def blank(height: int, width: int, box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


@settings(max_examples=150)
@given(SIZES, SIZES, SIZES, SIZES, st.sampled_from(fitting.MODES), st.sampled_from([*fitting.RESAMPLE]))
def test_resize_modes(height: int, width: int, to_height: int, to_width: int, mode: str, resample: str) -> None:
    image = noisy_image(height, width)
    try:
        wanted = THEIRS[resample].resize(image, to_height, to_width, mode)
    except ValueError:  # an image so narrow that nothing is left of it
        wanted = None
    ours = fitting.resize(image, to_height, to_width, mode, resample=resample)
    assert ours.size == (to_width, to_height)
    if wanted is not None:
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(wanted))


@pytest.mark.parametrize("mode", fitting.MODES)
def test_a_mask_stays_grey(mode: str) -> None:
    mask = noisy_image(40, 23, "L")
    wanted = LANCZOS.resize(mask, 32, 48, mode).convert("L")
    ours = fitting.resize(mask, 32, 48, mode)
    assert ours.mode == "L"
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(wanted))


@settings(max_examples=50)
@given(SIZES, SIZES, SIZES, SIZES)
def test_arrays_take_the_nearest_pixel(height: int, width: int, to_height: int, to_width: int) -> None:
    array = np.random.default_rng(0).random((2, height, width, 3)).astype(np.float32)
    wanted = LANCZOS.resize(array, to_height, to_width)
    np.testing.assert_array_equal(fitting.resize(array, to_height, to_width), wanted)
    np.testing.assert_array_equal(fitting.resize(array[1], to_height, to_width), wanted[1])
    np.testing.assert_array_equal(fitting.resize(array[1, ..., 0], to_height, to_width), wanted[1, ..., 0])


@settings(max_examples=200)
@given(st.data())
def test_crop_regions(data: st.DataObject) -> None:
    height, width, to_height, to_width = (data.draw(SIZES) for _ in range(4))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    mask, pad = blank(height, width, (left, top, right, bottom)), data.draw(st.integers(0, 40))
    ours = fitting.crop_region(mask, to_height, to_width, pad)
    assert ours == LANCZOS.get_crop_region(mask, to_width, to_height, pad)


def test_blurred_masks_and_overlays() -> None:
    original, image = noisy_image(40, 60), noisy_image(41, 60).resize((60, 40))
    mask = fitting.blur_mask(blank(40, 60, (10, 8, 44, 30)), 3)
    np.testing.assert_array_equal(np.asarray(mask), np.asarray(LANCZOS.blur(blank(40, 60, (10, 8, 44, 30)), 3)))
    for result, region in ((image, None), (noisy_image(32, 32), fitting.crop_region(mask, 32, 32, 4))):
        ours = fitting.overlay(result, mask, original, region)
        np.testing.assert_array_equal(
            np.asarray(ours), np.asarray(LANCZOS.apply_overlay(mask, original, result, region))
        )
        untouched = np.asarray(mask) == 0
        assert untouched.any()
        np.testing.assert_array_equal(np.asarray(ours)[untouched], np.asarray(original)[untouched])


def test_a_grid() -> None:
    found = [noisy_image(6, 9), noisy_image(6, 9, "L"), *(noisy_image(6, 9) for _ in range(4))]
    theirs = diffusers.utils.make_image_grid
    for options in ({"rows": 2, "cols": 3}, {"rows": 6, "cols": 1, "resize": 5}):
        ours = utils.make_image_grid(found, **options)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs(found, **options)))


def test_masks_for_adapters_are_black_or_white() -> None:
    masks = [noisy_image(40, 64, "L"), blank(40, 64, (3, 3, 30, 30))]
    wanted = diffusers.image_processor.IPAdapterMaskProcessor().preprocess(masks, height=32, width=48)
    ours = mask_pixels(masks, (32, 48), "mask")
    np.testing.assert_array_equal(ours, wanted.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("height", "width", "queries"),
    [(64, 64, 64), (64, 48, 12), (40, 72, 45), (9, 5, 180), (32, 32, 50), (1, 1, 7), (30, 20, 7), (16, 500, 3)],
)
@pytest.mark.filterwarnings("ignore:.*aspect ratio")
def test_masks_for_queries(height: int, width: int, queries: int) -> None:
    masks = np.random.default_rng(0).random((2, height, width)).astype(np.float32)
    downsample = diffusers.image_processor.IPAdapterMaskProcessor.downsample
    try:
        wanted = downsample(torch.tensor(masks), 2, queries, 1)[..., 0].numpy()
    except ZeroDivisionError:  # so few queries that they have no row
        wanted = None
    ours = fitting.mask_for_queries(masks[..., None], queries)
    assert ours.shape == (2, queries)
    if wanted is not None:
        np.testing.assert_allclose(ours, wanted, atol=2e-6)
