"""Which class opens a checkpoint: by task, family and ControlNet; classes of one name."""

from __future__ import annotations

import types
from typing import Any

import pytest

from diffuse_jax import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
)
from diffuse_jax.pipelines import PIPELINES
from diffuse_jax.pipelines.pipeline import pipeline_class
from diffuse_jax.weights import WeightsError

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
