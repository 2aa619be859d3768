"""A pipeline from one file in the original layout: everything but the vocabulary is in the file."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from diffuse_jax import schedulers
from diffuse_jax.layouts import write_single_file
from diffuse_jax.models import ControlNetModel, UNet2DConditionModel
from diffuse_jax.pipelines import (
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffuse_jax.weights import WeightsError
from diffuse_jax.weights.names import flatten, from_torch, torch_key
from diffuse_jax.weights.safetensors import read_safetensors, write_safetensors
from tests.layouts.families import FAMILIES, family_tensors
from tests.pipelines.tiny import tokenizer


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize(
    ("family", "kind", "padding"),
    [
        ("v1", StableDiffusionPipeline, {"tokenizer": "<|endoftext|>"}),
        ("v2", StableDiffusionPipeline, {"tokenizer": "!"}),
        ("xl", StableDiffusionXLPipeline, {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}),
    ],
)
def test_networks_sampler_and_padding_come_from_the_file(family, kind, padding, vocabulary: Path, tmp_path: Path, rng):
    tensors = family_tensors(family, rng)
    write_single_file(tmp_path / "model.safetensors", tensors, family)
    pipe = DiffusionPipeline.from_single_file(tmp_path / "model.safetensors", tokenizer=vocabulary)
    assert type(pipe) is kind
    assert pipe.params.keys() == FAMILIES[family].keys()
    for name, tree in pipe.params.items():
        for path, array in flatten(tree).items():
            assert np.array_equal(array, from_torch(path, tensors[name][torch_key(path)])), (name, path)
    assert isinstance(pipe.scheduler, schedulers.Scheduler)
    assert {name: pipe.components[name].pad_token for name in padding} == padding


def test_components_may_be_given(vocabulary: Path, tmp_path: Path, rng):
    write_single_file(tmp_path / "model.safetensors", family_tensors("v1", rng), "v1")
    unet = FAMILIES["v1"]["unet"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), unet.shapes())
    pipe = StableDiffusionPipeline.from_single_file(
        tmp_path / "model.safetensors",
        tokenizer=vocabulary,
        unet=(unet, params),
        scheduler=schedulers.EulerDiscreteScheduler(),
        safety_checker=None,
    )
    assert isinstance(pipe.components["unet"], UNet2DConditionModel)
    assert pipe.params["unet"] is params
    assert isinstance(pipe.scheduler, schedulers.EulerDiscreteScheduler)
    with pytest.raises(
        TypeError, match="a StableDiffusionPipeline, not a StableDiffusionXLPipeline, which needs text_enc"
    ):
        StableDiffusionXLPipeline.from_single_file(tmp_path / "model.safetensors", tokenizer=vocabulary)


def test_without_a_vocabulary_the_error_says_what_to_pass(tmp_path: Path, rng):
    write_single_file(tmp_path / "model.safetensors", family_tensors("v1", rng), "v1")
    with pytest.raises(WeightsError, match="with CLIP's vocab.json and merges.txt as tokenizer="):
        DiffusionPipeline.from_single_file(tmp_path / "model.safetensors", tokenizer=tmp_path / "nowhere")


def test_a_file_without_an_autoencoder_opens_with_one_that_is_given(vocabulary: Path, tmp_path: Path, rng):
    path = tmp_path / "model.safetensors"
    write_single_file(path, family_tensors("v1", rng), "v1")
    stored = {key: a for key, a in read_safetensors(path).items() if not key.startswith("first_stage_model.")}
    write_safetensors(path, {key: (a.dtype, a.shape) for key, a in stored.items()}, stored.values())
    vae = FAMILIES["v1"]["vae"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), vae.shapes())
    pipe = DiffusionPipeline.from_single_file(path, tokenizer=vocabulary, vae=(vae, params))
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.params["vae"] is params
    with pytest.raises(WeightsError, match=r"for v1: vae \(first_stage_model\.\*\).*vae=\(model, params\)"):
        DiffusionPipeline.from_single_file(path, tokenizer=vocabulary)


def test_a_plain_file_opens_for_any_task_of_its_family_and_others_only_for_their_own(
    vocabulary: Path, tmp_path: Path, rng
):
    path, options = tmp_path / "model.safetensors", {"tokenizer": vocabulary}
    write_single_file(path, tensors := family_tensors("v1", rng), "v1")
    assert type(StableDiffusionImg2ImgPipeline.from_single_file(path, **options)) is StableDiffusionImg2ImgPipeline
    with pytest.raises(TypeError, match="not a StableDiffusionControlNetPipeline, which needs controlnet as well"):
        StableDiffusionControlNetPipeline.from_single_file(path, **options)
    unet = FAMILIES["v1"]["unet"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), unet.shapes())
    net = ControlNetModel.from_unet(unet, zeros)
    pipe = StableDiffusionControlNetPipeline.from_single_file(path, **options, controlnet=net)
    assert pipe.params["controlnet"] is net[1]
    with pytest.raises(WeightsError, match="controlnet, text_encoder, unet, vae fit none of the single-file layouts"):
        pipe.save_single_file(tmp_path / "b.safetensors")
    with pytest.raises(TypeError, match="StableDiffusionPipeline has no component decoder; it has depth_"):
        DiffusionPipeline.from_single_file(path, **options, decoder=None)
    nine = {"conv_in.weight": np.zeros((32, 9, 3, 3), np.float32)}
    write_single_file(path, tensors | {"unet": tensors["unet"] | nine}, "v1")
    assert type(StableDiffusionInpaintPipeline.from_single_file(path, **options)) is StableDiffusionInpaintPipeline
    with pytest.raises(TypeError, match="a StableDiffusionInpaintPipeline, not a StableDiffusionImg2ImgPipeline; Diff"):
        StableDiffusionImg2ImgPipeline.from_single_file(path, **options)


@pytest.mark.parametrize("family", ["v1", "xl"])
def test_a_pipeline_is_saved_as_it_was_read(family: str, vocabulary: Path, tmp_path: Path, rng):
    write_single_file(tmp_path / "a.safetensors", family_tensors(family, rng), family)
    pipe = DiffusionPipeline.from_single_file(tmp_path / "a.safetensors", tokenizer=vocabulary)
    v_prediction = pipe.replace(scheduler=pipe.scheduler.replace(prediction_type="v_prediction"))
    stored = read_safetensors(tmp_path / "a.safetensors")
    for made, extra in ((pipe, set()), (v_prediction, {"v_pred"})):
        again = read_safetensors(made.save_single_file(tmp_path / "b.safetensors"))
        assert again.keys() == stored.keys() | extra
        assert all(np.array_equal(again[key], array) for key, array in stored.items())
    opened = DiffusionPipeline.from_single_file(tmp_path / "b.safetensors", tokenizer=vocabulary)
    assert opened.scheduler == v_prediction.scheduler


def test_settings_of_an_index_may_be_given(vocabulary: Path, tmp_path: Path, rng):
    tensors = family_tensors("xl", rng)
    tensors["unet"]["conv_in.weight"] = np.zeros((32, 8, 3, 3), np.float32)
    write_single_file(tmp_path / "a.safetensors", tensors, "xl")
    for given in ({}, {"is_cosxl_edit": True}):
        pipe = DiffusionPipeline.from_single_file(tmp_path / "a.safetensors", tokenizer=vocabulary, **given)
        assert pipe.options.get("is_cosxl_edit", False) is bool(given)
