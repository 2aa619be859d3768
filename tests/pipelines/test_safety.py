"""The safety checker of a pipeline: when it runs, what it says, and that no image depends on its batch."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax.convert import convert
from diffuse_jax.models import CLIPVisionConfig, StableDiffusionSafetyChecker
from diffuse_jax.pipelines import DiffusionPipeline, StableDiffusionDiffEditPipeline, StableDiffusionImg2ImgPipeline
from diffuse_jax.processors import CLIPImageProcessor, DPTImageProcessor
from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.latent import open_pipeline
from diffuse_jax.weights import WeightsError, read_json, write_json
from tests.models.filling import random_params
from tests.pipelines import tiny

VISION = CLIPVisionConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
PROCESSOR = CLIPImageProcessor(size=16, crop_size=(16, 16))
CHECKER = StableDiffusionSafetyChecker(VISION)
CALL: dict[str, Any] = {"prompt": ["a", "b", "c"], "seed": [1, 2, 3], "num_inference_steps": 2, "guidance_scale": 1.0}


def params_that_flag(threshold: float) -> dict[str, Any]:
    """Random parameters; an image is flagged if its similarity with a concept is above ``threshold``."""
    params = dict(random_params(CHECKER.shapes(), np.random.default_rng(2)))
    concepts = dict.fromkeys(("concept_embeds_weights", "special_care_embeds_weights"))
    return params | {name: np.full(params[name].shape, threshold, np.float32) for name in concepts}


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny.pipeline()


@pytest.fixture(scope="module")
def images(plain: Any) -> np.ndarray:
    return plain(output_type="np", **CALL).images


@pytest.fixture(scope="module")
def pipe(plain: Any, images: np.ndarray) -> Any:
    """With a threshold between the similarities of the images, so that some of them are flagged."""
    low, high = -1.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        params = params_that_flag(middle)
        flagged = np.asarray(CHECKER.apply({"params": params}, PROCESSOR.on_device(images)))
        if 0 < flagged.sum() < len(images):
            return plain.replace(safety_checker=(CHECKER, params), feature_extractor=PROCESSOR)
        low, high = (middle, high) if flagged.all() else (low, middle)
    raise AssertionError("no threshold tells these images apart")


def test_what_is_flagged_is_black_and_nothing_else_changes(pipe: Any, images: np.ndarray) -> None:
    with pytest.warns(UserWarning, match=r"of 3 images were flagged by the safety checker and are black"):
        out = pipe(output_type="np", **CALL)
    assert 0 < sum(out.nsfw_content_detected) < 3
    for image, before, flagged in zip(out.images, images, out.nsfw_content_detected, strict=True):
        assert isinstance(flagged, bool)
        np.testing.assert_array_equal(image, np.zeros_like(before) if flagged else before)


@pytest.mark.filterwarnings("ignore:.*flagged by the safety checker")
def test_an_image_is_judged_alone(pipe: Any, images: np.ndarray) -> None:
    """On a mesh, with padding, and in parts of a batch, the same images are flagged."""
    expected = pipe(output_type="np", **CALL).nsfw_content_detected
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    for changed, options in (
        (pipe.offload("safety_checker"), {}),
        (pipe, {"batch_size": 2}),
        (pipe.replace(mesh=mesh), {}),
    ):
        found = changed(output_type="np", **CALL, **options)
        assert found.nsfw_content_detected == expected
        assert [not image.any() for image in found.images] == expected


def test_latents_are_not_checked(pipe: Any, plain: Any) -> None:
    out = pipe(output_type="latent", **CALL)
    assert out.nsfw_content_detected is None
    assert "safety_checker" not in pipe.request(output_type="latent", **CALL).method.networks
    np.testing.assert_array_equal(out.images, plain(output_type="latent", **CALL).images)
    assert plain(output_type="np", **CALL).nsfw_content_detected is None


def test_other_tasks_have_it_too(pipe: Any) -> None:
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    request = other.request(image=np.zeros((16, 16, 3), np.uint8), **CALL)
    assert "safety_checker" in request.method.networks
    without = pipe.replace(safety_checker=None)
    assert "safety_checker" not in without.params
    assert "safety_checker" not in without.request(**CALL).method.networks


def test_it_is_saved_opened_and_left_out_on_request(pipe: Any, tmp_path: Path) -> None:
    folder = pipe.save_pretrained(tmp_path / "model")
    with warnings.catch_warnings(action="error"):
        opened = DiffusionPipeline.from_pretrained(folder)
        off = DiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
        again = DiffusionPipeline.from_pretrained(off.save_pretrained(tmp_path / "off"))
    assert opened.components["safety_checker"] == CHECKER
    jax.tree.map(np.testing.assert_array_equal, opened.params["safety_checker"], pipe.params["safety_checker"])
    back = convert(convert(folder, tmp_path / "flax", to="flax-msgpack"), tmp_path / "back")
    assert DiffusionPipeline.from_pretrained(back).components["safety_checker"] == CHECKER
    for unchecked in (off, again):
        assert unchecked.components["safety_checker"] is None and "safety_checker" not in unchecked.params
    with pytest.warns(UserWarning, match="there is no safety_checker, so images are not checked"):
        DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    with pytest.raises(ValueError, match="has a safety_checker but no feature_extractor"):
        DiffusionPipeline.from_pretrained(folder, feature_extractor=None)
    shutil.rmtree(folder / "safety_checker")
    with pytest.raises(WeightsError, match="no such folder; pass safety_checker=None to open without it"):
        DiffusionPipeline.from_pretrained(folder)


def test_what_prepares_images_for_a_depth_estimator_is_refused(plain: Any) -> None:
    with pytest.raises(ValueError, match="its feature_extractor is a DPTImageProcessor; leave the checker out"):
        plain.replace(safety_checker=(CHECKER, {}), feature_extractor=DPTImageProcessor(size=(16, 16)))


def test_a_mask_of_diffedit_is_no_image_to_check(pipe: Any) -> None:
    edit = StableDiffusionDiffEditPipeline.from_pipe(pipe)
    mask = edit.generate_mask(np.zeros((32, 32, 3), np.float32), "a", "b", num_maps_per_mask=2, seed=1)
    assert mask.shape[0] == 1
    assert {*np.unique(mask)} <= {0, 1}


def test_the_setting_is_saved(plain: Any, tmp_path: Path) -> None:
    folder = plain.save_pretrained(tmp_path / "model")
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"requires_safety_checker": True})
    with pytest.warns(UserWarning, match="there is no safety_checker"):
        DiffusionPipeline.from_pretrained(folder)
    with warnings.catch_warnings(action="error"):
        off = DiffusionPipeline.from_pretrained(folder, requires_safety_checker=False)
        DiffusionPipeline.from_pretrained(off.save_pretrained(tmp_path / "off"))


def test_training_neither_loads_it_nor_warns(pipe: Any, tmp_path: Path) -> None:
    folder = pipe.save_pretrained(tmp_path / "model")
    with warnings.catch_warnings(action="error"):
        opened = open_pipeline(folder, trainable=["unet"], mesh=make_mesh(data=1, devices=jax.devices()[:1]))
    assert opened.components["safety_checker"] is None
    assert opened.options == pipe.options
