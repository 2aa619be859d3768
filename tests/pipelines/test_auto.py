"""Which class opens a checkpoint: by task, family and ControlNet; classes of one name."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any

import numpy as np
import pytest

from diffuse_jax import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
)
from diffuse_jax.models import UNet2DConditionModel
from diffuse_jax.pipelines import (
    PIPELINES,
    Output,
    Request,
    StableDiffusionDiffEditPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionSAGPipeline,
)
from diffuse_jax.pipelines.pipeline import pipeline_class
from diffuse_jax.weights import WeightsError
from tests.models.filling import random_params
from tests.pipelines.tiny import UNET, pipeline
from tests.pipelines.tiny_stages import Parts

TASKS = {AutoPipelineForText2Image: "", AutoPipelineForImage2Image: "Img2Img", AutoPipelineForInpainting: "Inpaint"}


@pytest.mark.parametrize("saved_for", TASKS.values(), ids=lambda task: task or "Text2Image")
@pytest.mark.parametrize(("auto", "task"), TASKS.items(), ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_the_task_changes_and_the_controlnet_stays(auto: Any, task: str, saved_for: str) -> None:
    name = lambda *given, control="": auto.pipeline_for(f"StableDiffusion{control}{saved_for}Pipeline", "x", *given)
    plain, controlled = f"StableDiffusion{task}Pipeline", f"StableDiffusionControlNet{task}Pipeline"
    assert name({}).__name__ == plain
    assert name({"controlnet": object()}).__name__ == controlled
    assert name({}, control="ControlNet").__name__ == controlled
    assert name({"controlnet": None}, control="ControlNet").__name__ == plain
    own = plain.replace("StableDiffusion", "LatentConsistencyModel")
    expected = plain if auto is AutoPipelineForInpainting else own
    assert auto.pipeline_for("LatentConsistencyModelPipeline", "x", {}).__name__ == expected
    assert auto.pipeline_for(f"StableDiffusionXL{saved_for}Pipeline", "x", {}).__name__ == plain.replace(
        "on", "onXL", 1
    )


@pytest.mark.parametrize(
    ("auto", "name"),
    zip(TASKS, ("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline"), strict=True),
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_the_first_stage_of_a_cascade(auto: Any, name: str) -> None:
    for own in ("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline"):
        assert auto.pipeline_for(own, "x", {}).__name__ == name


@pytest.mark.parametrize("own", ["LDMTextToImagePipeline", "WuerstchenDecoderPipeline", "WuerstchenCombinedPipeline"])
def test_families_of_one_task(own: str) -> None:
    found = AutoPipelineForText2Image.pipeline_for(own, "x", {}).__name__
    assert found == own.replace("Decoder", "Combined")
    for auto in (AutoPipelineForImage2Image, AutoPipelineForInpainting):
        with pytest.raises(WeightsError, match=f"x: {own} has no {auto.__name__}; known: .*IFImg2ImgPipeline"):
            auto.pipeline_for(own, "x", {})


def test_decoders_of_embeddings_with_a_prior_of_their_own() -> None:
    """The image encoder of the other task is no part of a pipeline that makes images of prompts."""
    parts = Parts(pipeline())
    (karlo, variation), (stable, nearby) = parts.karlo(), parts.stable_unclip()
    assert type(AutoPipelineForText2Image.from_pipe(karlo)) is type(karlo)
    assert type(AutoPipelineForText2Image.from_pipe(stable)) is type(stable)
    assert type(AutoPipelineForImage2Image.from_pipe(nearby)) is type(nearby)
    for auto, own in ((AutoPipelineForImage2Image, karlo), (AutoPipelineForInpainting, stable)):
        with pytest.raises(WeightsError, match=f"{type(own).__name__} has no {auto.__name__}; known: .*UnCLIPPipeline"):
            auto.from_pipe(own)
    with pytest.raises(WeightsError, match="UnCLIPImageVariationPipeline has no AutoPipelineForImage2Image"):
        AutoPipelineForImage2Image.from_pipe(variation)
    with pytest.raises(ValueError, match="image_encoder"):
        AutoPipelineForImage2Image.from_pipe(stable)


@pytest.mark.parametrize("family", ["", "XL"])
@pytest.mark.parametrize("kind", ["Adapter", "SAG", "Panorama", "DiffEdit"])
def test_other_tasks_become_the_plain_one_of_their_family(kind: str, family: str) -> None:
    name = f"StableDiffusion{family}{kind}Pipeline"
    if name in PIPELINES:
        for auto, task in TASKS.items():
            assert auto.pipeline_for(name, "x", {}).__name__ == f"StableDiffusion{family}{task}Pipeline"


def test_the_plain_one_shares_parameters() -> None:
    sag = StableDiffusionSAGPipeline.from_pipe(pipeline())
    for auto, task in TASKS.items():
        plain = auto.from_pipe(sag)
        assert type(plain).__name__ == f"StableDiffusion{task}Pipeline"
        assert all(plain.params[name] is tree for name, tree in sag.params.items())


def test_a_unet_that_takes_more_than_the_task_gives_it_is_refused(rng: np.random.Generator) -> None:
    wide = lambda channels: UNet2DConditionModel(UNET.replace(in_channels=channels))
    own = lambda channels: (wide(channels), random_params(wide(channels).shapes(), rng))
    masked = pipeline().replace(unet=own(9))
    assert type(AutoPipelineForInpainting.from_pipe(masked)) is StableDiffusionInpaintPipeline
    message = "has a UNet with 9 input channels, and a StableDiffusionImg2ImgPipeline gives it 4; pass the UNet"
    with pytest.raises(WeightsError, match=message):
        AutoPipelineForImage2Image.from_pipe(masked)
    assert AutoPipelineForImage2Image.from_pipe(masked, unet=own(4)).components["unet"].config.in_channels == 4
    edit = StableDiffusionInstructPix2PixPipeline.from_pipe(masked, unet=own(8))
    with pytest.raises(WeightsError, match="this StableDiffusionInstructPix2PixPipeline has a UNet with 8 input"):
        AutoPipelineForInpainting.from_pipe(edit)


def test_a_call_is_annotated_with_what_it_returns() -> None:
    for call in (StableDiffusionSAGPipeline.__call__, StableDiffusionSAGPipeline.invert):
        assert inspect.signature(call).return_annotation is typing.get_type_hints(call)["return"] is Output
    assert inspect.signature(pipeline().__call__).return_annotation is Output
    assert "self" not in inspect.signature(pipeline().__call__).parameters
    assert inspect.signature(StableDiffusionDiffEditPipeline.generate_mask).return_annotation is not Request


def test_a_missing_pipeline_is_named() -> None:
    known = "known: .*StableDiffusion"
    with pytest.raises(WeightsError, match=f"x: DDPMPipeline has no AutoPipelineForText2Image; {known}"):
        AutoPipelineForText2Image.pipeline_for("DDPMPipeline", "x", {})


def test_a_controlnet_makes_a_class_of_every_family() -> None:
    found = AutoPipelineForText2Image.pipeline_for("StableDiffusionXLPipeline", "x", {"controlnet": object()})
    assert found.__name__ == "StableDiffusionXLControlNetPipeline"


@pytest.mark.parametrize(("auto", "task"), TASKS.items(), ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_perturbed_attention_is_asked_for_and_stays(auto: Any, task: str) -> None:
    name = lambda kind, **given: auto.pipeline_for(f"StableDiffusion{kind}Pipeline", "x", given).__name__
    assert name("", enable_pag=True) == f"StableDiffusionPAG{task}Pipeline"
    assert name("XLPAGInpaint") == f"StableDiffusionXLPAG{task}Pipeline"
    assert name("PAG", enable_pag=False) == f"StableDiffusion{task}Pipeline"
    if task == "Img2Img":  # diffusers has no such class
        with pytest.raises(WeightsError, match="unknown pipeline class 'StableDiffusionControlNetPAGImg2ImgPipeline'"):
            name("ControlNet", enable_pag=True)
    else:
        assert name("PAG", controlnet=object()) == f"StableDiffusionControlNetPAG{task}Pipeline"


@pytest.fixture
def define(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Define a pipeline class in a module of this name; it is forgotten after the test."""
    monkeypatch.setattr(PIPELINES, "_classes", {name: dict(found) for name, found in PIPELINES._classes.items()})
    make = lambda module: lambda namespace: namespace.update(__module__=module)
    return lambda name, module: types.new_class(name, (DiffusionPipeline,), {}, make(module))


def test_a_cell_that_is_run_again_replaces_its_class(define: Any) -> None:
    define("MyPipeline", "__main__")
    again = define("MyPipeline", "__main__")
    assert pipeline_class("MyPipeline", "model_index.json") is again


def test_classes_of_one_name_are_not_taken_for_each_other(define: Any) -> None:
    define("MyPipeline", "one")
    define("MyPipeline", "two")
    with pytest.raises(WeightsError, match="'MyPipeline' is defined in one and in two, .*rename one"):
        pipeline_class("MyPipeline", "model_index.json")
    with pytest.raises(ValueError, match="one.DDIMPipeline has the same name as .*give the class another name"):
        define("DDIMPipeline", "one")
