"""Conversion between layouts: nothing is lost, what is written is checked, and nothing half-written stays."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffuse_jax.convert as conversion
from diffuse_jax import weights
from diffuse_jax.convert import convert, open_source
from diffuse_jax.lora_conversion import new_file
from diffuse_jax.models import AutoencoderTiny, CLIPVisionConfig, CLIPVisionModel, UNet2DConditionModel
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.weights import WeightsError
from diffuse_jax.weights.safetensors import read_safetensors, write_safetensors
from diffuse_jax.writing import only_writer
from tests.layouts.families import FAMILIES
from tests.pipelines.tiny import tokenizer
from tests.weights.tiny import same_bits, views

CLASSES = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "v2-depth": "StableDiffusionDepth2ImgPipeline",
    "xl": "StableDiffusionXLPipeline",
    "xl-refiner": "StableDiffusionXLImg2ImgPipeline",
}


def pipeline(folder: Path, family: str = "v1") -> Path:
    """A folder in diffusers layout with a scheduler, something like a tokenizer, and what no layout here keeps."""
    entries: dict[str, tuple[str | None, str | None]] = {"image_encoder": (None, None)}
    for name, model in FAMILIES[family].items():
        params = weights.names.unflatten(views(model, np.random.default_rng(1)))
        model.save_pretrained(folder / name, params)
        entries[name] = (model.library(), type(model).__name__)
    weights.write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", "x": 1})
    weights.write_json(folder / "tokenizer" / "vocab.json", {"a": 0})
    weights.write_json(folder / "watermark" / "config.json", {})
    entries |= {"scheduler": ("diffusers", "DDIMScheduler"), "tokenizer": ("transformers", "CLIPTokenizer")}
    entries["watermark"] = ("stable_diffusion_xl", "StableDiffusionXLWatermarker")
    weights.write_index(folder, CLASSES[family], entries, {"requires_safety_checker": True})
    return folder


def assert_same(a: Path, b: Path, dtype: Any = None) -> None:
    first, second = open_source(a), open_source(b)
    assert first.networks.keys() == second.networks.keys()
    for name, network in first.networks.items():
        other = second.networks[name]
        assert type(network.model) is type(other.model)
        assert network.views.keys() == other.views.keys()
        for path, view in network.views.items():
            assert same_bits(view.astype(dtype or view.dtype), other.views[path]), (name, path)


@pytest.mark.parametrize("family", CLASSES)
def test_through_every_layout_and_back(family: str, tmp_path: Path) -> None:
    first = pipeline(tmp_path / "first", family)
    single = convert(first, tmp_path / "single.safetensors", to="single-file")
    with pytest.warns(UserWarning, match="holds no tokenizer"):
        again = convert(single, tmp_path / "again", to="diffusers")
    flax = convert(again, tmp_path / "flax", to="flax-msgpack")
    last = convert(flax, tmp_path / "last")
    for other in (single, again, flax, last):
        assert_same(first, other)
    index = weights.read_index(last)
    assert index.class_name == CLASSES[family]
    assert index.components.keys() == {*FAMILIES[family], "scheduler"}
    assert sorted(os.listdir(tmp_path)) == ["again", "first", "flax", "last", "single.safetensors"]


@pytest.mark.parametrize(("family", "padding"), [("v1", ["<|endoftext|>"]), ("xl", ["<|endoftext|>", "!"])])
def test_a_single_file_becomes_a_pipeline_with_a_tokenizer(family: str, padding: list[str], tmp_path: Path) -> None:
    single = convert(pipeline(tmp_path / "first", family), tmp_path / "single.safetensors", to="single-file")
    tokenizer().save_pretrained(tmp_path / "words")
    with warnings.catch_warnings(action="error"):
        folder = convert(single, tmp_path / "folder", tokenizer=tmp_path / "words")
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert [pipe.components[name].pad_token for name in ("tokenizer", "tokenizer_2")[: len(padding)]] == padding
    with pytest.warns(UserWarning, match="holds no tokenizer, so .*without will not have one"):
        convert(single, tmp_path / "without")
    with pytest.raises(ValueError, match="a folder has its own"):
        convert(tmp_path / "first", tmp_path / "x", tokenizer=tmp_path / "words")
    with pytest.raises(WeightsError, match="no vocabulary"):
        convert(single, tmp_path / "x", tokenizer=tmp_path / "first" / "unet")
    assert not (tmp_path / "x").exists()


def test_files_that_are_not_networks_are_copied(tmp_path: Path) -> None:
    out = convert(pipeline(tmp_path / "src"), tmp_path / "out")
    index = weights.read_index(out)
    assert set(index.absent) == {"image_encoder", "watermark"}
    assert index.options == {"requires_safety_checker": True}
    assert json.loads((out / "tokenizer" / "vocab.json").read_text()) == {"a": 0}
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text()) == {
        "_class_name": "DDIMScheduler",
        "x": 1,
    }
    assert not (out / "watermark").exists()


def test_a_single_file_has_no_place_for_an_image_encoder(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "src")
    vision = CLIPVisionModel(CLIPVisionConfig(hidden_size=12, num_hidden_layers=1, image_size=8, patch_size=8))
    vision.save_pretrained(folder / "image_encoder", weights.names.unflatten(views(vision, np.random.default_rng(1))))
    index = json.loads((folder / "model_index.json").read_text())
    weights.write_json(folder / "model_index.json", index | {"image_encoder": ["transformers", "CLIPVisionModel"]})
    with pytest.warns(UserWarning, match="no place for image_encoder, which is left out"):
        single = convert(folder, tmp_path / "single.safetensors", to="single-file")
    assert open_source(single).networks.keys() == {*FAMILIES["v1"]}


def test_old_flax_folders_have_old_names(tmp_path: Path) -> None:
    out = convert(pipeline(tmp_path / "src"), tmp_path / "out", to="flax-msgpack")
    data = json.loads((out / "model_index.json").read_text())
    assert data["_class_name"] == "FlaxStableDiffusionPipeline"
    assert data["unet"] == ["diffusers", "FlaxUNet2DConditionModel"]
    assert data["text_encoder"] == ["transformers", "FlaxCLIPTextModel"]
    assert data["scheduler"] == ["diffusers", "FlaxDDIMScheduler"]
    assert data["tokenizer"] == ["transformers", "CLIPTokenizer"]
    text = weights.read_checkpoint([out / "text_encoder" / "flax_model.msgpack"]).tensors
    assert "text_model/encoder/layers/0/self_attn/q_proj/kernel" in text
    vae = weights.read_checkpoint([out / "vae" / "diffusion_flax_model.msgpack"]).tensors
    assert "encoder/mid_block/attentions_0/query/kernel" in vae


@pytest.mark.parametrize("to", conversion.LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(to: str, dtype: str, tmp_path: Path) -> None:
    src = pipeline(tmp_path / "src")
    out = convert(src, tmp_path / "out.safetensors", to=to, dtype=dtype)
    assert_same(src, out, jnp.dtype(dtype))


def test_one_network(tmp_path: Path) -> None:
    src = pipeline(tmp_path / "src")
    out = convert(src / "unet", tmp_path / "unet", to="flax-msgpack", dtype="bfloat16")
    _, params = UNet2DConditionModel.from_pretrained(out, param_dtype="float32")
    assert params
    assert_same_network(src / "unet", convert(src / "unet", tmp_path / "unet.safetensors", to="single-file"))
    with pytest.raises(ValueError, match="holds only a UNet2DConditionModel; a tokenizer and a prediction type"):
        convert(tmp_path / "unet.safetensors", tmp_path / "x", prediction_type="epsilon")
    more = read_safetensors(tmp_path / "unet.safetensors") | {"image_encoder.x": np.zeros(1, np.float32)}
    shapes = {key: (array.dtype, array.shape) for key, array in more.items()}
    write_safetensors(tmp_path / "more.safetensors", shapes, more.values())
    with pytest.raises(WeightsError, match="not a complete Stable Diffusion checkpoint"):
        convert(tmp_path / "more.safetensors", tmp_path / "x")
    tiny = AutoencoderTiny()
    tiny.save_pretrained(tmp_path / "tiny", jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), tiny.shapes()))
    with pytest.raises(WeightsError, match="AutoencoderTiny has no single-file layout; those that have are UNet2DC"):
        convert(tmp_path / "tiny", tmp_path / "tiny.safetensors", to="single-file")


def assert_same_network(folder: Path, file: Path) -> None:
    first, second = UNet2DConditionModel.from_pretrained(folder), UNet2DConditionModel.from_single_file(file)
    assert first[0].config == second[0].config
    jax.tree.map(np.testing.assert_array_equal, first[1], second[1])


def test_existing_files_stay(tmp_path: Path) -> None:
    src = pipeline(tmp_path / "src")
    (tmp_path / "file.safetensors").write_text("mine")
    for to in conversion.LAYOUTS:
        for dst in (src, tmp_path / "file.safetensors"):
            if to == "single-file" and dst == src:
                continue
            with pytest.raises(FileExistsError, match="exists; remove it or choose another path"):
                convert(src, dst, to=to)
    assert (tmp_path / "file.safetensors").read_text() == "mine"
    with only_writer(tmp_path / "same"), pytest.raises(FileExistsError, match="being written by another process"):
        convert(src, tmp_path / "same")
    (tmp_path / "empty").mkdir()
    assert_same(src, convert(src, tmp_path / "empty"))
    with pytest.raises(ValueError, match="does not end in .safetensors"):
        convert(src, tmp_path / "x", to="single-file")
    for dtype in ("int8", "fp16"):
        with pytest.raises(ValueError, match=f"dtype must be a floating-point type .* got '{dtype}'"):
            convert(src, tmp_path / "x", dtype=dtype)
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="to must be one of diffusers, flax-msgpack, single-file, got 'onnx'"):
        convert(src, tmp_path / "x", to="onnx")


@pytest.mark.parametrize("kind", ["pipe", "link to nothing", "link to an empty folder", "link to itself"])
def test_what_is_not_a_file_stays_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename would put the result in its place; it is refused before the source is opened."""
    monkeypatch.setattr(conversion, "open_source", None)
    dst = tmp_path / "taken.safetensors"
    if kind == "pipe":
        os.mkfifo(dst)
    else:
        (tmp_path / "empty").mkdir()
        target = {"link to nothing": "nowhere", "link to an empty folder": "empty", "link to itself": dst.name}[kind]
        dst.symlink_to(tmp_path / target)
    for to in conversion.LAYOUTS:
        with pytest.raises(FileExistsError, match=r"taken\.safetensors exists; remove it or choose another path"):
            convert(tmp_path / "src", dst, to=to)
    with pytest.raises(FileExistsError, match=r"taken\.safetensors exists"):
        new_file(dst)
    assert os.path.lexists(dst)


@pytest.mark.parametrize("to", conversion.LAYOUTS)
def test_a_wrong_bit_is_found_and_nothing_stays(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = pipeline(tmp_path / "src")
    write = conversion.WRITERS[to]

    def spoil(source: Any, dst: Path, dtype: Any) -> None:
        write(source, dst, dtype)
        file = next(path for path in [dst, *dst.rglob("*")] if path.is_file() and path.stat().st_size > 20_000)
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    monkeypatch.setitem(conversion.WRITERS, to, spoil)
    with pytest.raises(WeightsError, match="differs from its source after writing"):
        convert(src, tmp_path / "out.safetensors", to=to)
    assert os.listdir(tmp_path) == ["src"]


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = pipeline(tmp_path / "src")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "write_rest", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(src, tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


def test_sources_that_cannot_be_converted(tmp_path: Path) -> None:
    src = pipeline(tmp_path / "src")
    index = json.loads((src / "model_index.json").read_text())
    write_safetensors(src / "unknown" / "model.safetensors", {}, [])
    weights.write_json(src / "model_index.json", index | {"unknown": ["diffusers", "TransformerOfTomorrow"]})
    with pytest.raises(WeightsError, match=r"model_index\.json: cannot convert a 'TransformerOfTomorrow'; known are"):
        convert(src, tmp_path / "out")
    weights.write_json(src / "model_index.json", index)
    tensors = read_safetensors(src / "vae" / "diffusion_pytorch_model.safetensors")
    del tensors["quant_conv.bias"]
    write_safetensors(
        src / "vae" / "diffusion_pytorch_model.safetensors",
        {key: (a.dtype, a.shape) for key, a in tensors.items()},
        tensors.values(),
    )
    with pytest.raises(WeightsError, match=r"src/vae: 1 missing, 0 unexpected, e\.g\. 'quant_conv.bias'"):
        convert(src, tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scheduler", r"scheduler: no such folder, but model_index\.json names a \w+Scheduler"),
        ("scheduler/scheduler_config.json", "scheduler_config.json: is not a regular file"),
        ("model_index.json", "model_index.json: is not a regular file"),
        ("unet/config.json", "unet/config.json: is not a regular file"),
    ],
)
def test_a_file_where_a_folder_belongs_and_the_reverse(name: str, message: str, tmp_path: Path) -> None:
    src = pipeline(tmp_path / "src")
    path = src / name
    if path.is_dir():
        shutil.rmtree(path)
        path.touch()
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(WeightsError, match=message):
        convert(src, tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


def test_a_pipeline_without_networks_is_not_converted(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(WeightsError, match="names no network, so there is nothing to convert"):
        convert(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()
