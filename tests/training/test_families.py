"""Which checkpoints the trainers take: what a class name alone can say is said before anything is read."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from diffuse_jax.pipelines import PIPELINES
from diffuse_jax.training.families import LatentFamily, family_of, trained
from diffuse_jax.training.families.inpainting import random_masks


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
    for method in ("text to image", "DreamBooth"):
        with pytest.raises(ValueError, match=f"x is a {name}; .*train.*; this trainer supports"):
            family_of(name, "x", method)


def test_what_no_trainer_is_for_comes_with_advice() -> None:
    """So every pipeline is trained from prompts, or refused with what to do instead."""
    ours = [kind for kind in PIPELINES.classes() if kind.__module__.startswith("diffuse_jax.")]
    refused = [kind.__name__ for kind in ours if trained(getattr(kind, "family", None)) is None]
    assert len(refused) > 20
    for name in refused:
        with pytest.raises(ValueError, match=f"x is a {name}; .+; this trainer supports"):
            family_of(name, "x", "text to image")


def test_random_masks_lie_in_the_image_and_cover_a_part_of_it() -> None:
    """A rectangle covers a quarter of the image on average, an ellipse pi / 4 of that."""
    masks = np.asarray(random_masks(jax.random.key(0), 2000, 32, 48))
    assert masks.shape == (2000, 32, 48, 1)
    assert {*np.unique(masks)} == {0.0, 1.0}
    assert masks.mean() == pytest.approx((1 + np.pi / 4) / 8, abs=0.01)
    boxes = [m[:, m.any((0, 2))][m.any((1, 2))] for m in masks if m.sum() > 50]
    full = np.mean([box.all() for box in boxes])
    assert 0.4 < full < 0.6, "half of them are rectangles"
