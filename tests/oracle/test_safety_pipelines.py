"""Pipelines with a safety checker: PyTorch diffusers flags and blackens the same images of the same folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax import pipelines
from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.pipelines.programs import Programs

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
torch, diffusers, transformers = folders.torch, folders.diffusers, folders.transformers
twins = pytest.importorskip("tests.oracle.twins")

MEAN_TOLERANCE = 0.02  # of 255, mean over all pixels
SEEDS = [3, 4, 5, 6]
CALL: dict[str, Any] = {"prompt": ["a cat", "two dogs!", "x", "y"], "num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like SD 1.x, whose checker flags about half of what it makes: a threshold is between their scores."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    path = tmp_path_factory.mktemp("sd1")
    plain = diffusers.StableDiffusionPipeline.from_pretrained(folders.stable_diffusion(path / "plain"))
    plain.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    config = transformers.CLIPConfig(vision_config=twins.VISION, projection_dim=24)
    checker = folders.lively(StableDiffusionSafetyChecker(config))
    edge = checker.config.vision_config.image_size
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": edge}, crop_size=edge)
    with torch.no_grad():
        pixels = processor(plain(generator=generators(), **CALL).images, return_tensors="pt").pixel_values
        embeds = checker.visual_projection(checker.vision_model(pixels)[1])
        concept = torch.randn(24)
        checker.concept_embeds[:] = checker.special_care_embeds[:] = concept
        scores, _ = torch.nn.functional.cosine_similarity(embeds, concept[None]).sort()
        checker.concept_embeds_weights[:] = (scores[1] + scores[2]) / 2
        checker.special_care_embeds_weights[:] = 1.0
    assert scores[2] - scores[1] > 0.004, "scores are rounded to three decimals"
    parts = {**plain.components, "safety_checker": checker, "feature_extractor": processor}
    diffusers.StableDiffusionPipeline(**parts).save_pretrained(path / "checked")
    return path / "checked"


def generators() -> list[Any]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


@pytest.mark.filterwarnings("ignore:.*flagged by the safety checker")
@pytest.mark.parametrize(("task", "output_type"), [("", "np"), ("Img2Img", "pil")])
def test_the_same_images_are_black(task: str, output_type: str, folder: Path) -> None:
    name, call = f"StableDiffusion{task}Pipeline", dict(CALL)
    if task:
        call |= {"image": folders.images(4, 32), "strength": 1.0}
    twin = getattr(diffusers, name).from_pretrained(folder)
    twin.set_progress_bar_config(disable=True)
    wanted = twin(generator=generators(), output_type=output_type, **call)
    pipe = getattr(pipelines, name).from_pretrained(folder).replace(programs=Programs())
    ours = pipe(seed=SEEDS, noise="torch", output_type=output_type, **call)
    assert ours.nsfw_content_detected == wanted.nsfw_content_detected
    assert task or sum(wanted.nsfw_content_detected) == 2
    unit = 255 if output_type == "np" else 1
    for flagged, *pair in zip(wanted.nsfw_content_detected, ours.images, wanted.images, strict=True):
        found, theirs = (unit * np.asarray(image, np.float64) for image in pair)
        assert np.abs(found - theirs).mean() < (MEAN_TOLERANCE if output_type == "np" else 0.5)
        assert flagged == (not found.any()) == (not theirs.any())


def test_what_is_saved_opens_in_pytorch(folder: Path, tmp_path: Path) -> None:
    DiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    first = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert again.feature_extractor.crop_size == first.feature_extractor.crop_size
    theirs = first.safety_checker.state_dict()
    for key, tensor in again.safety_checker.state_dict().items():
        assert torch.equal(tensor, theirs[key]), key
