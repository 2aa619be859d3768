"""``model_index.json``: what it says, and what it must not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffuse_jax.weights import Component, WeightsError, read_index, write_index
from diffuse_jax.weights.index import VERSION

ENTRIES = {"unet": ("diffusers", "UNet2DConditionModel"), "tokenizer": ("transformers", "CLIPTokenizer")}


def test_write_and_read(tmp_path: Path) -> None:
    write_index(tmp_path, "StableDiffusionPipeline", ENTRIES | {"safety_checker": (None, None)}, {"kind": [1, 2, 3]})
    index = read_index(tmp_path)
    assert index.class_name == "StableDiffusionPipeline"
    assert index.components == {name: Component(*entry, tmp_path / name) for name, entry in ENTRIES.items()}
    assert index.absent == ("safety_checker",)
    assert index.options == {"kind": [1, 2, 3]}
    assert json.loads((tmp_path / "model_index.json").read_text())["_diffusers_version"] == VERSION


def test_the_version_of_a_folder_is_kept(tmp_path: Path) -> None:
    """A new one has that of the format, without which PyTorch's inpainting pipeline does not open."""
    write_index(tmp_path, "StableDiffusionPipeline", ENTRIES, {"_diffusers_version": "0.8.0"})
    assert read_index(tmp_path).options == {"_diffusers_version": "0.8.0"}


def test_old_flax_classes_lose_their_prefix(tmp_path: Path) -> None:
    write_index(tmp_path, "FlaxStableDiffusionPipeline", {"unet": ("diffusers", "FlaxUNet2DConditionModel")})
    index = read_index(tmp_path)
    assert index.class_name == "StableDiffusionPipeline"
    assert index.components["unet"].class_name == "UNet2DConditionModel"


BAD: dict[str, tuple[Any, str]] = {
    "up": ({"../unet": ["diffusers", "X"]}, "component '../unet' is not the plain name"),
    "absolute": ({"/etc": ["diffusers", "X"]}, "component '/etc' is not the plain name"),
    "deeper": ({"a/b": ["diffusers", "X"]}, "component 'a/b' is not the plain name"),
    "dots": ({"..": ["diffusers", "X"]}, "component '..' is not the plain name"),
    "backslash": ({"..\\unet": ["diffusers", "X"]}, "is not the plain name"),
    "null byte": ({"unet\0": ["diffusers", "X"]}, "is not the plain name"),
    "newline": ({"unet\n": ["diffusers", "X"]}, "is not the plain name"),
    "no library": ({"unet": [None, "X"]}, "component 'unet' has a class but no library"),
    "no class name": ({"_class_name": None}, "does not name the pipeline's class"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_entries_are_named(kind: str, tmp_path: Path) -> None:
    entries, message = BAD[kind]
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"} | entries))
    with pytest.raises(WeightsError, match=r"model_index\.json: ") as error:
        read_index(tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", "[" * 100_000])
def test_files_that_are_not_an_index(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text, encoding="latin-1")
    with pytest.raises(WeightsError, match=r"model_index\.json"):
        read_index(tmp_path)
    with pytest.raises(WeightsError, match=r"nowhere/model_index\.json: no such file"):
        read_index(tmp_path / "nowhere")


def test_names_that_leave_the_folder_are_not_written_either(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not the plain name"):
        write_index(tmp_path, "X", {"../unet": ("diffusers", "Y")})
    assert list(tmp_path.iterdir()) == []
