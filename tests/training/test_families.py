"""Which checkpoints the trainers take: what a class name alone can say is said before anything is read."""

from __future__ import annotations

import pytest

from diffuse_jax.training.families import LatentFamily, family_of


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLImg2ImgPipeline"])
def test_stable_diffusion(name: str) -> None:
    assert isinstance(family_of(name, "x", "comparison"), LatentFamily)


@pytest.mark.parametrize(
    "name", ["IFPipeline", "KandinskyV22Pipeline", "KandinskyPriorPipeline", "WuerstchenPriorPipeline"]
)
def test_others(name: str) -> None:
    assert not isinstance(family_of(name, "x"), LatentFamily)
    with pytest.raises(ValueError, match=f"x is a {name}; this trainer supports .*StableDiffusionPipeline"):
        family_of(name, "x", "comparison")


@pytest.mark.parametrize(
    "name",
    [
        *("KandinskyPipeline", "KandinskyInpaintPipeline", "KandinskyCombinedPipeline", "WuerstchenDecoderPipeline"),
        *("StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline", "UnCLIPPipeline", "UnCLIPImageVariationPipeline"),
        *("LDMTextToImagePipeline", "LDMSuperResolutionPipeline", "LDMPipeline", "ScoreSdeVePipeline"),
    ],
)
def test_pipelines_that_no_trainer_is_for(name: str) -> None:
    """Some have the text encoder of Stable Diffusion, and a UNet that needs more."""
    with pytest.raises(ValueError, match=f"x is a {name}; this trainer supports"):
        family_of(name, "x", "text to image")
