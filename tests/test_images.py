"""One way from images to RGB pixels for training and sampling: each mode and orientation is converted or refused."""

from __future__ import annotations

import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

import diffuse_jax
from diffuse_jax import images, utils
from diffuse_jax.pipelines import inputs
from diffuse_jax.training.data.transform import Record, decode, image_size


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(*values: int) -> list[list[list[int]]]:
    return [[[value] * 3 for value in values]]


def palette() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    return image


RED, HALF = (200, 10, 10), (200, 10, 10, 128)
CONVERTED = {
    "1-bit": (stored(Image.fromarray(np.array([[False, True]]))), grey(0, 255)),
    "grey": (stored(Image.fromarray(np.array([[7, 200]], np.uint8))), grey(7, 200)),
    "16-bit grey": (stored(Image.fromarray(np.array([[0, 257 * 90, 65535]], np.uint16))), grey(0, 90, 255)),
    "16-bit grey TIFF": (stored(Image.fromarray(np.array([[300, 65535]], np.uint16)), "TIFF"), grey(1, 255)),
    "palette": (stored(palette()), [[[10, 20, 30], [200, 100, 50]]]),
    "alpha": (stored(Image.new("RGBA", (1, 1), HALF)), [[list(RED)]]),
    "grey with alpha": (stored(Image.new("LA", (1, 1), (9, 3))), grey(9)),
    "palette with transparency": (stored(palette(), transparency=0), [[[10, 20, 30], [200, 100, 50]]]),
    "CMYK": (stored(Image.new("CMYK", (1, 1), (0, 0, 0, 255)), "TIFF"), grey(0)),
    "animated": (
        stored(Image.new("L", (1, 1), 40), "GIF", save_all=True, append_images=[Image.new("L", (1, 1), 90)]),
        grey(40),
    ),
    "RGB": (stored(Image.new("RGB", (1, 1), RED)), [[list(RED)]]),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_what_is_converted_is_the_same_in_training_and_sampling(name: str) -> None:
    content, wanted = CONVERTED[name]
    np.testing.assert_array_equal(np.asarray(decode(Record(content, ("",), name))), wanted)
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(inputs.pixels(image, None, "image")[0], np.float32(wanted) / 255)


@pytest.mark.parametrize("name", CONVERTED)
def test_load_image_converts_the_same_from_everywhere(name: str, tmp_path: Path, server: Server) -> None:
    content, wanted = CONVERTED[name]
    file = tmp_path / "an image"
    file.write_bytes(content)
    server.content = content
    with Image.open(file) as opened:
        for source in (content, bytearray(content), file, str(file), opened, server.url):
            found = diffuse_jax.load_image(source)
            assert found.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(found), wanted)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_load_image_takes_arrays(dtype: Any, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (4, 5, 3), np.uint8)
    given = pixels.astype(dtype) if dtype == np.uint8 else (pixels / 255).astype(dtype)
    np.testing.assert_array_equal(np.asarray(utils.load_image(given)), pixels)
    for grey in (given[..., 0], given[..., :1]):
        np.testing.assert_array_equal(np.asarray(utils.load_image(grey)), np.repeat(pixels[..., :1], 3, -1))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (b"no image", ValueError, "the image is not a readable image"),
        ("missing.png", FileNotFoundError, "missing.png"),
        ("ftp://host/a.png", ValueError, "ftp://host/a.png is not an http or https URL"),
        ("file:///etc/passwd", ValueError, "is not an http or https URL"),
        (np.zeros((2, 4, 4, 3), np.uint8), ValueError, r"\[H,W,3\], .* got \(2, 4, 4, 3\)"),
        (np.zeros((4, 4, 4), np.uint8), ValueError, r"got \(4, 4, 4\)"),
        (np.zeros((0, 4), np.uint8), ValueError, r"got \(0, 4\)"),
        (np.full((4, 4), 2.0), ValueError, "got float64 from 2.0 to 2.0"),
        (np.full((4, 4), np.nan), ValueError, "got float64 from nan to nan"),
        (np.ones((4, 4), np.int64), ValueError, "got int64 from 1 to 1"),
        (Image.new("F", (2, 2)), ValueError, "the image has floating-point values"),
        ([Image.new("RGB", (2, 2))], TypeError, "got list"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_load_image_refuses(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        utils.load_image(source)


class Server:
    """A web server on this machine; ``content`` is what it answers, a status if it is a number."""

    content: bytes | int = 404

    def __init__(self) -> None:
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = owner.content if isinstance(owner.content, bytes) else b""
                self.send_response(200 if isinstance(owner.content, bytes) else owner.content)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/a.png?size=1"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    thread = threading.Thread(target=found.http.serve_forever, daemon=True)
    thread.start()
    yield found
    found.http.shutdown()
    found.http.server_close()


def test_a_server_without_the_image_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.content = 404
    with pytest.raises(OSError, match=r"http://127.*a\.png\?size=1 cannot be read: HTTP Error 404"):
        utils.load_image(server.url)
    server.content = b"<html>"
    with pytest.raises(ValueError, match=r"http://127.* is not a readable image"):
        utils.load_image(server.url)
    monkeypatch.setattr(utils, "LARGEST_DOWNLOAD", 5)
    with pytest.raises(ValueError, match="is larger than"):
        utils.load_image(server.url)
    with pytest.raises(OSError, match="cannot be read"):
        utils.load_image("http://127.0.0.1:9/a.png")


def test_a_grid_of_wrong_numbers_or_sizes_is_refused() -> None:
    small, large = Image.new("RGB", (2, 3)), Image.new("RGB", (4, 3))
    assert diffuse_jax.make_image_grid([small] * 6, 2, 3).size == (6, 6)
    with pytest.raises(ValueError, match="a grid of 2x3 takes 6 images, got 5"):
        utils.make_image_grid([small] * 5, 2, 3)
    with pytest.raises(ValueError, match="must have one size, got 2x3, 4x3"):
        utils.make_image_grid([small, large], 1, 2)


def test_greyscale_multiplied_by_its_alpha_is_divided_by_it() -> None:
    image = Image.new("LA", (1, 1), (100, 128)).convert("La")
    assert abs(images.rgb(image, "image").getpixel((0, 0))[0] - 100) <= 1  # type: ignore[index]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_values_of_unknown_range_are_refused_with_the_name_of_the_file(mode: str, tmp_path: Path) -> None:
    file = tmp_path / "depth.tiff"
    Image.new(mode, (2, 2)).save(file)
    with pytest.raises(ValueError, match=rf"depth\.tiff has .* values \(mode '{mode}'\) of unknown range; scale them"):
        decode(Record(str(file), ("",), str(file)))
    for read in (inputs.pixels, inputs.mask_pixels):
        with (
            Image.open(file) as image,
            pytest.raises(ValueError, match=r"image \(.*depth\.tiff\) has .* unknown range"),
        ):
            read(image, (2, 2), "image")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])  # Pillow itself turns what it decodes from a TIFF
@pytest.mark.parametrize("orientation", [*range(11), 65535])
def test_every_orientation_is_turned_upright_or_left(orientation: int, kind: str, rng: np.random.Generator) -> None:
    """Pillow's own function is the second opinion; 0 and those over 8 are not defined."""
    pixels = rng.integers(0, 256, (4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    content = stored(Image.fromarray(pixels), kind, exif=exif)
    record = Record(content, ("",), "a")
    with Image.open(io.BytesIO(stored(Image.fromarray(pixels), exif=exif))) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    with Image.open(io.BytesIO(content)) as image:
        assert image_size(record) == wanted.shape[:2]
        np.testing.assert_array_equal(np.asarray(decode(record)), wanted)
        np.testing.assert_array_equal(inputs.pixels(image, None, "image")[0], np.float32(wanted) / 255)
        again = inputs.pixels(images.upright(image), None, "image")[0]
    np.testing.assert_array_equal(again, np.float32(wanted) / 255, err_msg="what was turned is not turned once more")


@pytest.mark.parametrize("value", ["6", b"\x06", [6], (6, 6), 2.5, None])
def test_an_orientation_of_a_wrong_type_is_none(value: object) -> None:
    image = Image.new("RGB", (6, 4))
    image.getexif()._data = {images.ORIENTATION: value}  # type: ignore[attr-defined]
    image.getexif()[images.ORIENTATION] = value
    assert images.upright(image) is image
    assert images.upright_size(image) == (4, 6)


def test_damaged_exif_is_none() -> None:
    content = stored(Image.new("RGB", (6, 4)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert image_size(Record(content, ("",), "a")) == (4, 6)
    assert decode(Record(content, ("",), "a")).size == (6, 4)


def test_other_formats_are_not_opened_whatever_their_name(tmp_path: Path) -> None:
    """Pillow would start Ghostscript for this one."""
    file = tmp_path / "a.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    assert Image.open(file).format == "EPS"
    with pytest.raises(ValueError, match=r"a\.png is not a readable image.*formats: PNG, JPEG"):
        decode(Record(str(file), ("",), str(file)))
    assert not images.is_image(file)


@pytest.mark.parametrize("kind", images.SIGNATURES)
def test_files_of_every_format_begin_as_it_says(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{kind.lower()}"
    Image.new("RGB", (3, 2)).save(file, kind)
    assert images.is_image(file)
    assert decode(Record(str(file), ("",), "a")).size == (3, 2)


def test_a_folder_is_searched_for_images_and_what_is_skipped_is_counted(tmp_path: Path) -> None:
    content = stored(Image.new("RGB", (3, 2)))
    kept = ["a.png", "b.JFIF", "sub/c.jpg"]
    left = ["._a.png", ".ipynb_checkpoints/a.png", "notes.txt", "sub/.hidden.png", "text.png", "empty.png"]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes({"text.png": b"no image", "empty.png": b""}.get(name, content))
    found, skipped = images.find_images(tmp_path)
    assert found == [tmp_path / name for name in kept]
    assert skipped == images.Skipped(len(left), str(tmp_path / "._a.png"))
