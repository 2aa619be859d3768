"""Components that a pipeline may have or not: an image encoder and what prepares images for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

from diffuse_jax import weights
from diffuse_jax.convert import convert, open_source
from diffuse_jax.models import CLIPVisionConfig, CLIPVisionModelWithProjection, UNet2DConditionModel
from diffuse_jax.pipelines import (
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from diffuse_jax.pipelines.catalogue import OPTIONAL
from diffuse_jax.processors import CLIPImageProcessor
from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.latent import open_pipeline
from diffuse_jax.weights import WeightsError
from tests.models.filling import random_params
from tests.pipelines.tiny import UNET, pipeline

VISION = CLIPVisionConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
PREPARE = CLIPImageProcessor(size=16, crop_size=(16, 16))


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    net = CLIPVisionModelWithProjection(VISION)
    params = random_params(net.shapes(), np.random.default_rng(3))
    return pipeline().replace(image_encoder=(net, params), feature_extractor=PREPARE)


@pytest.fixture(scope="module")
def folder(pipe: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipe.save_pretrained(tmp_path_factory.mktemp("optional") / "model")


def test_they_are_saved_opened_and_shared(pipe: StableDiffusionPipeline, folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["image_encoder"] == ["transformers", "CLIPVisionModelWithProjection"]
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    again = DiffusionPipeline.from_pretrained(folder, dtype="bfloat16")
    assert again.components["image_encoder"] == CLIPVisionModelWithProjection(VISION, dtype="bfloat16")
    assert again.components["feature_extractor"] == PREPARE
    assert {x.dtype.name for x in jax.tree.leaves(again.params["image_encoder"])} == {"bfloat16"}
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.params["image_encoder"] is pipe.params["image_encoder"]
    assert other.components["feature_extractor"] is PREPARE


def test_none_leaves_them_out_and_they_can_be_added(pipe: StableDiffusionPipeline, folder: Path) -> None:
    plain = DiffusionPipeline.from_pretrained(folder, image_encoder=None, feature_extractor=None)
    assert {plain.components.get(name) for name in OPTIONAL} == {None}
    assert "image_encoder" not in plain.params
    net, params = pipe.components["image_encoder"], pipe.params["image_encoder"]
    for with_one in (plain.replace, pipeline().replace, lambda **x: type(pipe).from_pipe(plain, **x)):
        assert with_one(image_encoder=(net, params)).components["image_encoder"] == net
    with pytest.raises(TypeError, match=r"image_encoder: pass a network as \(model, params\)"):
        plain.replace(image_encoder=net)
    with pytest.raises(TypeError, match="feature_extractor must be a diffuse_jax ImageProcessor, got builtins.str"):
        plain.replace(feature_extractor="clip")
    assert plain.replace(feature_extractor=None).components["feature_extractor"] is None


@pytest.mark.parametrize("kind", ["CLIPFeatureExtractor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"])
def test_the_classes_of_every_release_of_transformers_are_known(kind: str, folder: Path, tmp_path: Path) -> None:
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}).save_pretrained(tmp_path / "feature_extractor")
    weights.write_index(tmp_path, "StableDiffusionPipeline", {"feature_extractor": ("transformers", kind)})
    given = dict(pipeline().components)
    params = pipeline().params
    parts = {name: (part, params[name]) if name in params else part for name, part in given.items()}
    opened = DiffusionPipeline.from_pretrained(tmp_path, **parts)
    assert opened.components["feature_extractor"] == CLIPImageProcessor(size=16)


def test_an_image_encoder_of_other_sizes_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "image_encoder" / "config.json").read_text())
    saved = DiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path / "model")
    weights.write_json(saved / "image_encoder" / "config.json", config | {"hidden_size": 32})
    with pytest.raises(WeightsError, match="image_encoder"):
        DiffusionPipeline.from_pretrained(saved)


def test_a_network_in_the_place_of_another_is_refused(pipe: StableDiffusionPipeline) -> None:
    unet = pipe.components["unet"], pipe.params["unet"]
    checkers = "StableDiffusionSafetyChecker or IFSafetyChecker"
    for name, kind in (("image_encoder", "CLIPVisionModelWithProjection"), ("safety_checker", checkers)):
        with pytest.raises(TypeError, match=f"{name} must be a {kind}, got UNet2DConditionModel"):
            pipe.replace(**{name: unet})
    for given in (unet, [unet, unet]):
        with pytest.raises(TypeError, match="controlnet must be a ControlNetModel, got UNet2DConditionModel"):
            StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=given)


def test_variations_need_an_encoder_of_the_unets_width_and_take_no_image_adapters(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    variation = StableDiffusionImageVariationPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match="the image_encoder has embeddings of width 512, and the UNet attends to 16"):
        variation.request(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="StableDiffusionImageVariationPipeline takes no IP-Adapters"):
        variation.load_ip_adapter(tmp_path)


def test_variations_leave_text_encoders_behind(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    """What is saved opens again; a class that takes prompts ignores no text encoder."""
    variation = StableDiffusionImageVariationPipeline.from_pipe(pipe)
    assert not {"text_encoder", "tokenizer"} & {*variation.components, *variation.params}
    assert variation.params["unet"] is pipe.params["unet"]
    opened = DiffusionPipeline.from_pretrained(variation.save_pretrained(tmp_path / "variation"))
    assert type(opened) is StableDiffusionImageVariationPipeline
    second = (pipe.components["text_encoder"], pipe.params["text_encoder"])
    components = {**pipe.components, "text_encoder_2": second[0]}
    several = dataclasses.replace(pipe, components=components, params={**pipe.params, "text_encoder_2": second[1]})
    with pytest.raises(TypeError, match="has text_encoder_2, which StableDiffusionImg2ImgPipeline does not use"):
        StableDiffusionImg2ImgPipeline.from_pipe(several)
    assert StableDiffusionImg2ImgPipeline.from_pipe(several, text_encoder_2=None).params["unet"] is pipe.params["unet"]


def test_they_are_on_the_mesh(folder: Path) -> None:
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    opened = DiffusionPipeline.from_pretrained(folder, mesh=mesh)
    moved = DiffusionPipeline.from_pretrained(folder).replace(mesh=mesh)
    for placed in (opened, moved):
        for x in jax.tree.leaves(placed.params["image_encoder"]):
            assert x.sharding.device_set == {*mesh.devices.flat}


def test_training_leaves_them_in_their_folders(folder: Path) -> None:
    opened = open_pipeline(folder, trainable=["unet"], mesh=make_mesh(data=1, devices=jax.devices()[:1]))
    assert {opened.components.get(name) for name in OPTIONAL} == {None}


@pytest.mark.parametrize(
    ("cls", "channels", "advice"),
    [
        (StableDiffusionInstructPix2PixPipeline, 8, "train/instruct_pix2pix.py starts from"),
        (StableDiffusionPipeline, 5, "train a ControlNet for depth instead"),
        (StableDiffusionPipeline, 7, "train the second stage of DeepFloyd IF instead"),
    ],
)
def test_training_refuses_a_unet_that_takes_more_than_latents(
    cls: type, channels: int, advice: str, pipe: StableDiffusionPipeline, tmp_path: Path, rng: np.random.Generator
) -> None:
    net = UNet2DConditionModel(UNET.replace(in_channels=channels))
    folder = cls.from_pipe(pipe, unet=(net, random_params(net.shapes(), rng))).save_pretrained(tmp_path)
    message = f"a {cls.__name__} whose UNet has {channels} input channels; this trainer .*{advice}"
    with pytest.raises(ValueError, match=message):
        open_pipeline(folder, trainable=["unet"], mesh=make_mesh(data=1, devices=jax.devices()[:1]))


def test_conversion_keeps_them_in_folders(folder: Path, tmp_path: Path) -> None:
    flax = convert(folder, tmp_path / "flax", to="flax-msgpack")
    back = convert(flax, tmp_path / "back")
    assert {"image_encoder", "unet"} <= open_source(back).networks.keys()
    assert DiffusionPipeline.from_pretrained(back).components["feature_extractor"] == PREPARE
