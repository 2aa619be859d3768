"""What masks and images may be, and that black is not taken for white."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffuse_jax.pipelines.inputs import as_list, eight_bit, image_size, image_sizes, mask_pixels, pixels
from diffuse_jax.pipelines.tasks import images_by_net, one_per_net

SIZE = (2, 3)
WHITE = np.array([[True, False, False], [False, True, True]])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32, np.float64])
def test_a_mask_may_be_classes_or_shades(dtype: Any) -> None:
    given = [WHITE.astype(dtype), (WHITE * 255).astype(np.uint8), Image.fromarray((WHITE * 255).astype(np.uint8))]
    for mask in (*given, Image.fromarray(WHITE), np.stack([WHITE.astype(dtype)] * 2)[..., None]):
        for found in mask_pixels(mask, SIZE, "mask_image"):
            np.testing.assert_array_equal(found[..., 0], WHITE)
    assert not mask_pixels(np.zeros(SIZE, dtype), SIZE, "mask_image").any()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.fromarray(WHITE.astype(np.uint8)), "mask_image has values from 0 to 1, where white is 255"),
        (WHITE * 255, "must be uint8, or floating-point in .0, 1.; got int64 from 0 to 255"),
        (WHITE * 2.0, "got float64 from 0.0 to 2.0"),
        (np.zeros((0, 3), np.uint8), "must be 2x3 with 1 channels"),
    ],
    ids=["classes as shades", "other integers", "beyond white", "empty"],
)
def test_a_mask_of_unknown_range_is_refused(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_pixels(mask, SIZE, "mask_image")


def test_an_image_of_zeros_and_ones_is_black_with_a_warning() -> None:
    edges = np.repeat(WHITE[..., None], 3, -1)
    with pytest.warns(UserWarning, match="control image as uint8 has values from 0 to 1, where white is 255"):
        assert pixels(edges.astype(np.uint8), SIZE, "control image").max() == np.float32(1 / 255)
    np.testing.assert_array_equal(pixels(edges.astype(np.float32), SIZE, "image")[0], edges)
    assert pixels(np.zeros((*SIZE, 3), np.uint8), SIZE, "image").max() == 0, "black is an image too"


def test_sizes_of_images_on_a_device_are_read_without_computing() -> None:
    def sizes(batch: jax.Array) -> jax.Array:
        assert image_sizes([batch, Image.new("L", (4, 2))], "image") == [(6, 8), (6, 8), (2, 4)]
        assert image_size(batch, "image", 4) == (4, 8)
        return batch

    assert not jax.make_jaxpr(sizes)(np.zeros((2, 6, 8, 3), np.float32)).jaxpr.eqns


def test_a_prompt_that_is_no_unicode_is_refused_and_any_other_text_is_not() -> None:
    assert as_list("café 🍎", "prompt") == ["café 🍎"]
    with pytest.raises(ValueError, match=r"negative_prompt must be valid Unicode text .*caf.*udce9"):
        as_list(["fine", b"caf\xe9".decode(errors="surrogateescape")], "negative_prompt")


def test_each_network_has_a_number() -> None:
    for given in (0.5, np.float32(0.5), jnp.float32(0.5), [0.5, 0.5], (0.5, np.array(0.5)), jnp.full(2, 0.5)):
        assert one_per_net(given, 2, "scale") == [0.5, 0.5]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "scale must be a number, or a list of numbers, got None"),
        ("7", "scale must be a number, or a list of numbers, got '7'"),
        ([1.0, np.inf], r"scale must be finite, got \[1.0, inf\]"),
        ("strong", "scale must be a number, or a list of numbers, got 'strong'"),
        ([[1.0], 2.0], "scale must be a number, or a list of numbers"),
        ([[1.0, 2.0]], "scale has 2 entries for 2 ControlNets"),
        ([], "scale has 0 entries for 2 ControlNets"),
    ],
)
def test_what_is_no_number_for_each_network_is_refused(value: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        one_per_net(value, 2, "scale")


@pytest.mark.parametrize("images", [[], [[], []], [["a"], []]])
def test_lists_without_control_images_are_refused(images: Any) -> None:
    with pytest.raises(ValueError, match="there are 2 ControlNets and [01] control images"):
        images_by_net(images, 2)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_image_processors_get_eight_bits_of_any_array(kind: Any) -> None:
    image = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    for given in (kind(image), kind(image.astype(np.float32) / 255)):
        found = eight_bit(given, "image")
        assert all(isinstance(one, np.ndarray) and one.dtype == np.uint8 for one in found)
        np.testing.assert_array_equal(found, image)
