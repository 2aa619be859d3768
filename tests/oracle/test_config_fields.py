"""Every setting of diffusers' and transformers' classes is known: honoured, limited to one value, or harmless."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from diffuse_jax import models, pipelines, schedulers
from diffuse_jax.models.base import Model
from diffuse_jax.models.bit import BitConfig
from diffuse_jax.pipelines.catalogue import NOT_LOADED, OPTIONAL
from diffuse_jax.processors import CLIPImageProcessor, DPTImageProcessor, ImageProcessor
from diffuse_jax.schedulers.configuration import setting_names
from diffuse_jax.text import CLIPTextConfig
from tests.schedulers.samplers import EVERY

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffuse_jax.torch_backend.networks import torch_class  # noqa: E402

NETWORKS: list[type[Model]] = [
    models.UNet2DConditionModel,
    models.UNet2DModel,
    models.AutoencoderKL,
    models.AutoencoderTiny,
    models.AsymmetricAutoencoderKL,
    models.ConsistencyDecoderVAE,
    models.VQModel,
    models.ControlNetModel,
    models.T2IAdapter,
    models.PaellaVQModel,
    models.WuerstchenDiffNeXt,
    models.WuerstchenPrior,
    models.PriorTransformer,
    models.StableUnCLIPImageNormalizer,
    models.UnCLIPTextProjModel,
]
PIPELINES = [
    cls
    for name, cls in vars(pipelines).items()
    if name.endswith("Pipeline") and hasattr(diffusers, name) and cls.required
]
KEYWORDS = {"self", "args", "kwargs"}


def parameters(cls: type) -> set[str]:
    """The names that a constructor takes; a deprecated class of diffusers hides them behind ``*args``."""
    base = next(c for c in cls.__mro__ if {*inspect.signature(c.__init__).parameters} - KEYWORDS)
    return {*inspect.signature(base.__init__).parameters} - KEYWORDS


def fields(config: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(config)} - {"extra"}


@pytest.mark.parametrize("network", NETWORKS, ids=lambda cls: cls.__name__)
def test_networks(network: type[Model]) -> None:
    theirs, config = parameters(torch_class(network)), network.config_class
    alias = {"attention_head_dim"}  # read as num_attention_heads
    assert theirs <= fields(config) | {*config.fixed, *config.harmless} | alias, "a new setting"
    assert fields(config) - {"use_midblock_gn"} <= theirs  # of weights that diffusers has no class for
    assert {*config.fixed} - {"quantization_config"} <= theirs, "only settings that exist are refused"
    written = {"block_out_channels", "force_upcast"}  # into every file, whether or not the class takes them
    assert {*config.harmless} <= theirs | written
    assert not {*config.fixed} & fields(config)


def test_text_encoders() -> None:
    theirs = {*transformers.CLIPTextConfig().to_dict()}
    ours = fields(CLIPTextConfig) | {*CLIPTextConfig.fixed, *CLIPTextConfig.harmless}
    assert theirs <= ours, "a new setting"
    read_by_pipelines = {"use_attention_mask"}
    assert fields(CLIPTextConfig) - theirs == read_by_pipelines


def test_vision_encoders() -> None:
    theirs, config = {*transformers.CLIPVisionConfig().to_dict()}, models.CLIPVisionConfig
    assert theirs <= fields(config) | {*config.fixed, *config.harmless}, "a new setting"
    assert fields(config) <= theirs


def test_depth_estimators() -> None:
    for theirs, config in ((transformers.DPTConfig(), models.DPTConfig), (transformers.BitConfig(), BitConfig)):
        keys = {*theirs.to_dict()}
        assert keys <= fields(config) | {*config.fixed, *config.harmless}, "a new setting"
        assert fields(config) <= keys


@pytest.mark.parametrize("processor", [CLIPImageProcessor, DPTImageProcessor])
def test_image_processors(processor: type[ImageProcessor]) -> None:
    theirs = {*getattr(transformers, processor.__name__)().to_dict()}
    assert theirs <= fields(processor) | {*processor.fixed, *processor.harmless}, "a new setting"
    crop = {"do_center_crop", "crop_size", "do_convert_rgb"} if processor is DPTImageProcessor else set()
    assert fields(processor) <= theirs | crop


@pytest.mark.parametrize("name", EVERY)
def test_samplers(name: str) -> None:
    """Every setting is a field, which test_schedulers compares with diffusers; few have no influence."""
    cls = getattr(schedulers, name)
    assert {*cls.harmless} <= {*setting_names(cls)}
    assert not cls.fixed


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda cls: cls.__name__)
def test_pipelines(pipeline: type[pipelines.DiffusionPipeline]) -> None:
    theirs = parameters(getattr(diffusers, pipeline.__name__))
    parts = {*pipeline.required, *OPTIONAL, *NOT_LOADED, "text_encoder", "tokenizer"}
    assert theirs <= parts | {*pipeline.settings}, "a new component, or a new value of model_index.json"
    of_stages = {*pipelines.WuerstchenPriorPipeline.settings, *pipelines.WuerstchenDecoderPipeline.settings}
    of_stages = of_stages if pipeline is pipelines.WuerstchenCombinedPipeline else set()
    assert {*pipeline.settings} <= theirs | {"requires_aesthetics_score"} | of_stages
