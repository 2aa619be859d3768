"""From a record to an example: upright, resized, cut, mirrored, with one of its captions."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffuse_jax.control_images import canny
from diffuse_jax.training.data.settings import CacheSettings, DataSettings
from diffuse_jax.training.data.tags import TagSettings
from diffuse_jax.training.data.transform import Record, Transform, cover, decode, image_size

from .data_sets import flat_image, png


def noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def record(pixels: np.ndarray, *captions: str) -> Record:
    return Record(png(Image.fromarray(pixels)), captions or ("a",), "a.png")


@pytest.mark.parametrize(("size", "expected"), [((6, 9), (8, 12)), ((7, 5), (11, 8)), ((8, 8), (8, 8))])
def test_the_shorter_side_is_resized_and_the_longer_rounded_down(size: tuple[int, int], expected: tuple) -> None:
    resized = cover(flat_image(9, *size), (8, 8))
    assert (resized.height, resized.width) == expected


def test_the_middle_is_cut_out(rng: np.random.Generator) -> None:
    pixels = noise(rng, 8, 13)
    example = Transform(8, center_crop=True)(record(pixels), index=3, position=0)
    np.testing.assert_array_equal(example.pixels, pixels[:, 2:10])
    assert (example.original_size, example.crop_top_left, example.target_size) == ((8, 13), (0, 2), (8, 8))
    assert (example.index, example.caption, example.name) == (3, "a", "a.png")


def test_a_mask_is_cut_and_mirrored_with_its_image(rng: np.random.Generator) -> None:
    pixels = noise(rng, 10, 17)
    masked = record(pixels)._replace(mask=png(Image.fromarray(pixels[..., 0])))
    transform = Transform(8, random_flip=True)
    for position in range(20):
        example = transform(record(np.repeat(pixels[..., :1], 3, -1))._replace(mask=masked.mask), 0, position)
        assert example.mask is not None
        assert example.mask.dtype == np.uint8
        np.testing.assert_array_equal(example.mask, example.pixels[..., 0], err_msg="resized in the same way too")
    assert transform(record(pixels), 0, 0).mask is None
    for wrong, message in (
        (pixels[:8, :, 0], r"the mask of a.png has 17 x 8 pixels, and its image 17 x 10; both must have"),
        (
            np.zeros_like(pixels[..., 0]),
            "the mask of a.png is black everywhere, .*; invert the mask, or leave the im",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            transform(record(pixels)._replace(mask=png(Image.fromarray(wrong))), 0, 0)


def test_positions_of_crops_and_mirrored_crops_are_right(rng: np.random.Generator) -> None:
    """``crop_top_left`` of a mirrored example is the position in the mirrored image.

    The reference uses the width of the cut instead of that of the image, which can be negative.
    """
    pixels = noise(rng, 8, 13)
    transform = Transform(8, random_flip=True)
    seen = Counter()
    for position in range(100):
        example = transform(record(pixels), 0, position)
        top, left = example.crop_top_left
        plain, mirrored = pixels[:, left : left + 8], pixels[:, ::-1][:, left : left + 8]
        flip = np.array_equal(example.pixels, mirrored)
        assert flip or np.array_equal(example.pixels, plain)
        assert top == 0 <= left <= 5
        seen[left, flip] += 1
    assert len(seen) == 2 * 6, "every place, both ways"


def test_control_images_are_cropped_and_mirrored_like_their_images(rng: np.random.Generator) -> None:
    """Pixel by pixel, also if the file of the control image is larger."""
    pixels, transform = noise(rng, 8, 13), Transform(8, random_flip=True)
    large = Image.fromarray(255 - pixels).resize((26, 16), Image.Resampling.NEAREST)
    for control in (Image.fromarray(255 - pixels), large):
        row = record(pixels)._replace(conditioning=png(control))
        nearest = dataclasses.replace(transform, interpolation="nearest")
        for example in (nearest(row, 0, position) for position in range(20)):
            assert example.conditioning is not None
            np.testing.assert_array_equal(example.conditioning, 255 - example.pixels)
    assert transform(record(pixels), 0, 0).conditioning is None


def test_control_images_are_computed_from_the_crop(rng: np.random.Generator) -> None:
    example = Transform(8, random_flip=True, conditioning="canny")(record(noise(rng, 16, 26)), 0, 3)
    np.testing.assert_array_equal(example.conditioning, canny(example.pixels))


def test_a_smaller_square_can_be_cut(rng: np.random.Generator) -> None:
    pixels = noise(rng, 8, 8)
    example = Transform(8, crop_size=5)(record(pixels), 0, 1)
    top, left = example.crop_top_left
    np.testing.assert_array_equal(example.pixels, pixels[top : top + 5, left : left + 5])


def test_a_bucket_decides_the_size() -> None:
    example = Transform(8).fixed(record(np.zeros((10, 30, 3), np.uint8)), 0, size=(4, 16))
    assert example.pixels is not None
    assert (example.pixels.shape, example.crop_top_left) == ((4, 16, 3), (0, 0)) or example.pixels.shape == (4, 16, 3)
    assert example.target_size == (4, 16)
    assert example.original_size == (10, 30)


def test_choices_depend_on_seed_and_position_only(rng: np.random.Generator) -> None:
    one = record(noise(rng, 8, 40), "a", "b", "c")
    draw = lambda seed: [Transform(8, random_flip=True, seed=seed)(one, 0, p) for p in range(20)]
    first, again, other = ([(e.crop_top_left, e.caption) for e in draw(seed)] for seed in (0, 0, 1))
    assert first == again != other


def test_shares_of_captions() -> None:
    one = record(np.zeros((8, 8, 3), np.uint8), "a", "b")
    examples = [Transform(8, empty_share=0.1, pixels=False)(one, 0, position) for position in range(4000)]
    shares = {text: n / 4000 for text, n in Counter(e.caption for e in examples).items()}
    assert shares == pytest.approx({"": 0.1, "a": 0.45, "b": 0.45}, abs=0.03)
    assert all(e.caption == ("a", "b", "")[e.caption_index] for e in examples)
    assert examples[0].pixels is None


def test_one_draw_drops_captions_and_control_images() -> None:
    """With probability 0.1 each: the caption alone, the image alone, and both."""
    one, transform = record(np.zeros((8, 8, 3), np.uint8), "a"), Transform(8, dropout=0.1, pixels=False)
    examples = [transform(one, 0, position) for position in range(4000)]
    shares = {drawn: n / 4000 for drawn, n in Counter((e.caption, e.keeps_conditioning) for e in examples).items()}
    expected = {("a", True): 0.7, ("", True): 0.1, ("a", False): 0.1, ("", False): 0.1}
    assert shares == pytest.approx(expected, abs=0.03)
    assert transform.fixed(one, 0).keeps_conditioning is None
    assert Transform(8, pixels=False)(one, 0, 0).keeps_conditioning is None


def test_images_are_turned_upright_and_transparency_is_dropped(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = noise(rng, 4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is the right side
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    turned = Record(str(tmp_path / "a.png"), ("",), "a")
    np.testing.assert_array_equal(np.asarray(decode(turned)), np.rot90(pixels, -1))
    assert image_size(turned) == (6, 4)
    transparent = Image.fromarray(np.concatenate([pixels, np.zeros((4, 6, 1), np.uint8)], -1))
    np.testing.assert_array_equal(np.asarray(decode(Record(png(transparent), ("",), "b"))), pixels)


@pytest.mark.parametrize("damaged", [b"no image", png(flat_image(3, 40, 40))[:60]])
def test_damaged_images_are_named(damaged: bytes) -> None:
    with pytest.raises(ValueError, match="holiday.png is not a readable image"):
        decode(Record(damaged, ("",), "holiday.png"))


@pytest.mark.parametrize("read", [decode, image_size])
def test_files_without_an_image_and_images_too_large_are_named(
    read: Callable[[Record], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for damaged in (b"", b"no image", png(flat_image(3, 40, 40))):
        with pytest.raises(ValueError, match="key7 in a.tar is not a readable image"):
            read(Record(damaged, ("",), "key7 in a.tar"))


TAGS = "emoji, cat face , noto,  smiling, yellow, round"


def captions(count: int, **tags: Any) -> list[str]:
    """The caption of this many examples, all of one record."""
    transform = Transform(8, pixels=False, tags=TagSettings(**tags))
    return [transform(Record("a.png", (TAGS,), "a.png"), 0, position).caption for position in range(count)]


def test_tags_are_shuffled_after_those_that_stay() -> None:
    found = captions(200, shuffle_tags=True, keep_tags=2)
    assert found == captions(200, shuffle_tags=True, keep_tags=2), "the same in every run"
    assert all(caption.startswith("emoji, cat face, ") for caption in found)
    assert {frozenset(caption.split(", ")) for caption in found} == {frozenset(re.split(" *, *", TAGS))}
    assert len({*found}) == 24, "all orders of four tags"


def test_tags_are_left_out() -> None:
    found = captions(2000, tag_dropout=0.25, keep_tags=1)
    assert all(caption.split(", ")[0] == "emoji" for caption in found)
    for tag in ("cat face", "round"):
        assert np.mean([tag in caption for caption in found]) == pytest.approx(0.75, abs=0.04)
    order = re.split(" *, *", TAGS)
    assert all((kept := caption.split(", ")) == sorted(kept, key=order.index) for caption in found)
    assert {*captions(3, tag_dropout=1.0)} == {""}


def test_captions_without_tags_stay_as_they_are() -> None:
    assert {*captions(3)} == {TAGS}
    assert {*captions(50, shuffle_tags=True, tag_separator="|")} == {TAGS}, "one tag"


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"tag_dropout": 1.5}, "tag_dropout"),
        ({"keep_tags": -1, "shuffle_tags": True}, "keep_tags"),
        ({"keep_tags": 1}, "--keep_tags 1 has no effect without --shuffle_tags or --tag_dropout"),
        ({"tag_separator": " ", "shuffle_tags": True}, "--tag_separator must have a character that is not blank"),
    ],
)
def test_impossible_tags_are_refused(tags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TagSettings(**tags)


def test_captions_that_change_are_not_stored() -> None:
    with pytest.raises(ValueError, match="leave out --shuffle_tags and --tag_dropout"):
        DataSettings(tags=TagSettings(shuffle_tags=True), caches=CacheSettings(cache_text_embeddings=True))
