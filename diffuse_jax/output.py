"""Images in a folder, each with what made it: in its own metadata, and as a line of ``metadata.jsonl``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffuse_jax.writing import naming, partial_file

if TYPE_CHECKING:
    from PIL import Image

METADATA = "metadata.jsonl"
NAME = re.compile(r"image-(\d+)\.png")


def writable(folder: Path) -> Path:
    """The folder, made if need be.

    Raises:
      OSError: files cannot be written there; said before anything is computed for it.
    """
    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{folder} cannot be a folder: it, or a part of its path, is a file") from None
    except OSError as error:
        raise type(error)(error.errno, f"{folder} cannot be written: {error.strerror}") from None


def save_images(
    images: Sequence[Image.Image], folder: Path, made: Sequence[Mapping[str, Any]] | None = None
) -> list[Path]:
    """Write ``image-0001.png`` and so on, after those already there, also where several processes write.

    No half-written file is ever visible. Each image's settings go into the PNG, as ``parameters`` in the form that
    AUTOMATIC1111's web UI writes and as JSON under ``diffuse_jax``, and as a line into ``metadata.jsonl``, which names
    the file and the prompt as data sets of images do.

    Args:
      images: what is written.
      folder: where; made if need be.
      made: for each image its settings: ``prompt``, ``seed`` and any other JSON values.

    Returns:
      The files.
    """
    folder = writable(folder)
    settings = [dict(one) for one in made] if made is not None else [{} for _ in images]
    paths = [_save(image, folder, one) for image, one in zip(images, settings, strict=True)]
    if made is not None:
        lines = [
            json.dumps({"file_name": path.name, "text": one.get("prompt", ""), **one}, ensure_ascii=False)
            for path, one in zip(paths, settings, strict=True)
        ]
        _append(folder / METADATA, "".join(f"{line}\n" for line in lines))
    return paths


def _save(image: Image.Image, folder: Path, settings: Mapping[str, Any]) -> Path:
    """One image under the next free number."""
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    if settings:
        info.add_itxt("parameters", a1111_parameters(settings, image.size))
        info.add_itxt("diffuse_jax", json.dumps(dict(settings), ensure_ascii=False))
    with naming(folder), partial_file(folder, "image") as partial:
        image.save(partial.file, format="PNG", pnginfo=info)
        partial.file.close()
        return _claim(partial.path, folder)


def _claim(partial: Path, folder: Path) -> Path:
    """Give a written file the next free name: a link fails where another process was faster."""
    number = 1 + max((int(m[1]) for p in folder.iterdir() if (m := NAME.fullmatch(p.name))), default=0)
    while True:
        path = folder / f"image-{number:04d}.png"
        try:
            os.link(partial, path)
            return path
        except FileExistsError:
            number += 1
        except OSError:  # a file system without links: claim the name, then put the image there
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                os.replace(partial, path)
                return path
            number += 1


def _append(path: Path, text: str) -> None:
    """Add lines in one write, so that those of several processes do not mix."""
    with naming(path), path.open("ab", buffering=0) as file:
        rest = text.encode()
        while rest:  # what a full disk has no room for is an error of the next write
            rest = rest[file.write(rest) :]


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
"""Our setting -> its name in the web UI, in the order in which it writes them."""

A1111_RNG = {"torch": "CPU", "cuda": "NV"}
"""Our ``noise`` -> what the web UI calls this source of noise."""


def a1111_parameters(settings: Mapping[str, Any], size: tuple[int, int]) -> str:
    """Settings as AUTOMATIC1111's web UI writes them: prompt, negative prompt, then ``Name: value`` pairs."""
    values = {"size": f"{size[0]}x{size[1]}", "rng": A1111_RNG.get(settings.get("noise", "")), **settings}
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    pairs = [f"{word}: {values[name]}" for name, word in A1111_NAMES.items() if values.get(name) is not None]
    return "\n".join([*lines, ", ".join(pairs)])
