"""Saving images with the settings that produced them: in each PNG's metadata, and as a line of ``metadata.jsonl``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffuse_jax.writing import expanded, make_folder, naming, partial_file, refuse_special, write_all

if TYPE_CHECKING:
    from PIL import Image, PngImagePlugin

METADATA = "metadata.jsonl"
NAME = re.compile(r"image-(\d+)\.png")


def writable(folder: Path) -> Path:
    """The folder, created if needed; called before any images are computed.

    Raises:
      OSError: files cannot be written there.
    """
    folder = expanded(folder)
    try:
        with tempfile.TemporaryFile(dir=make_folder(folder)):
            refuse_special(folder / METADATA)
            return folder
    except (NotADirectoryError, FileExistsError):
        raise
    except OSError as error:
        raise type(error)(error.errno, f"{folder} cannot be written: {error.strerror}") from None


def save_images(
    images: Sequence[Image.Image], folder: Path, settings: Sequence[Mapping[str, Any]] | None = None
) -> list[Path]:
    """Write ``image-0001.png`` and so on, numbered after the existing files; several processes may write at once.

    No half-written file is ever visible. Each image's settings are stored in the PNG, as ``parameters`` in the format
    of AUTOMATIC1111's web UI and as JSON under ``diffuse_jax``, and as a line of ``metadata.jsonl`` with ``file_name``
    and ``text``, as image data sets have it.

    Args:
      images: the images to write.
      folder: the folder to write to; created if needed.
      settings: each image's settings: ``prompt``, ``seed`` and any other JSON values.

    Returns:
      The paths of the new files.
    """
    folder = writable(folder)
    of_image = [dict(one) for one in settings] if settings is not None else [{} for _ in images]
    paths = [_save(image, folder, one) for image, one in zip(images, of_image, strict=True)]
    if settings is not None:
        lines = [
            json.dumps({"file_name": path.name, "text": one.get("prompt", ""), **one}, ensure_ascii=False)
            for path, one in zip(paths, of_image, strict=True)
        ]
        _append(folder / METADATA, "".join(f"{line}\n" for line in lines))
    return paths


def _save(image: Image.Image, folder: Path, settings: Mapping[str, Any]) -> Path:
    """Write one image under the next free number."""
    info = png_info(settings, image)
    with naming(folder), partial_file(folder, "image") as partial:
        image.save(partial.file, format="PNG", pnginfo=info)
        partial.file.close()
        return _claim(partial.path, folder)


def png_info(settings: Mapping[str, Any], image: Image.Image) -> PngImagePlugin.PngInfo:
    """The settings of an image as texts for its PNG; none if there are no settings."""
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    if settings:
        parameters = a1111_parameters(settings, image.size).replace("\0", "\ufffd")  # texts of PNG hold no NUL
        info.add_itxt("parameters", in_utf8(parameters).decode())
        info.add_itxt("diffuse_jax", in_utf8(json.dumps(dict(settings), ensure_ascii=False)).decode())
    return info


def in_utf8(text: str) -> bytes:
    """UTF-8, with half a surrogate pair (a byte of a file name that is not UTF-8) as JSON writes it: ``\\udc80``."""
    return text.encode(errors="backslashreplace")


def _claim(partial: Path, folder: Path) -> Path:
    """Give a written file the next free name; linking fails if another process has just taken it."""
    number = 1 + max((int(m[1]) for p in folder.iterdir() if (m := NAME.fullmatch(p.name))), default=0)
    while True:
        path = folder / f"image-{number:04d}.png"
        try:
            os.link(partial, path)
            return path
        except FileExistsError:
            number += 1
        except OSError:  # a file system without hard links: claim the name, then move the image there
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                os.replace(partial, path)
                return path
            number += 1


def _append(path: Path, text: str) -> None:
    """Append lines in one write, so that lines of several processes do not mix."""
    with naming(path), path.open("ab", buffering=0) as file:
        write_all(path, file, in_utf8(text))


A1111_NAMES = {
    "num_inference_steps": "Steps",
    "scheduler": "Sampler",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
    "clip_skip": "Clip skip",
    "rng": "RNG",
}
"""Our setting -> its name in the web UI, in the web UI's order."""

A1111_RNG = {"torch": "CPU", "cuda": "NV"}
"""Our ``noise`` -> what the web UI calls this source of noise."""


def a1111_parameters(settings: Mapping[str, Any], size: tuple[int, int]) -> str:
    """Settings in the format of AUTOMATIC1111's web UI: prompt, negative prompt, then ``Name: value`` pairs."""
    values = {"size": f"{size[0]}x{size[1]}", "rng": A1111_RNG.get(settings.get("noise", "")), **settings}
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    pairs = [f"{word}: {_quoted(values[name])}" for name, word in A1111_NAMES.items() if values.get(name) is not None]
    return "\n".join([*lines, ", ".join(pairs)])


def _quoted(value: Any) -> str:
    """A value as the web UI writes it: as JSON if it has characters that separate values."""
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text := str(value)) else text
