"""Stable unCLIP against PyTorch diffusers: from prompts through a prior, and from images."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax.pipelines import DiffusionPipeline, StableUnCLIPImg2ImgPipeline, StableUnCLIPPipeline
from diffuse_jax.pipelines.configured import configured_pipeline
from diffuse_jax.pipelines.programs import Programs
from tests.oracle.agreement import require_same

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")

torch, diffusers = folders.torch, folders.diffusers

PROMPTS = ["a cat", "two red houses"]
RNG = np.random.default_rng(3)
EMBEDDING_NOISE = RNG.standard_normal((2, 32)).astype(np.float32)
PRIOR_NOISE = RNG.standard_normal((2, 32)).astype(np.float32)
LATENTS = RNG.standard_normal((2, 16, 16, 4)).astype(np.float32)
STEPS = {"num_inference_steps": 4, "prior_num_inference_steps": 3}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.stable_unclip(tmp_path_factory.mktemp("unclip") / "model")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.stable_unclip_img2img(tmp_path_factory.mktemp("unclip") / "model")


@pytest.fixture(scope="module")
def from_text(text_folder: Path) -> Any:
    return opened(text_folder)


@pytest.fixture(scope="module")
def from_image(image_folder: Path) -> Any:
    return opened(image_folder)


def opened(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder).replace(programs=Programs())


def reference(kind: str, folder: Path) -> Any:
    pipe = getattr(diffusers, kind).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_from_prompts(text_folder: Path, from_text: Any) -> None:
    pipe, twin = from_text, reference("StableUnCLIPPipeline", text_folder)
    assert type(pipe) is StableUnCLIPPipeline
    noised = twin.noise_image_embeddings
    twin.noise_image_embeddings = functools.partial(noised, noise=torch.tensor(EMBEDDING_NOISE))

    def both(**changes: Any) -> None:
        request = {"prompt": PROMPTS, "output_type": "np", **STEPS, **changes}
        latents = {"prior_latents": torch.tensor(PRIOR_NOISE), "latents": torch.tensor(LATENTS.transpose(0, 3, 1, 2))}
        theirs = twin(**request, **latents)
        rows = {"image_embedding_noise": EMBEDDING_NOISE}
        require_same(pipe, pipe(**request, prior_latents=PRIOR_NOISE, latents=LATENTS, rows=rows).images, theirs.images)

    both()
    assert pipe.programs.compilations == 2, "one for each stage"
    both(num_inference_steps=3, prior_num_inference_steps=2, guidance_scale=3.0, prior_guidance_scale=2.0)
    both(noise_level=500, negative_prompt=["rain", "x"])
    assert pipe.programs.compilations == 2, "steps, scales and levels are data"


def test_from_images(image_folder: Path, from_image: Any) -> None:
    pipe, twin = from_image, reference("StableUnCLIPImg2ImgPipeline", image_folder)
    assert type(pipe) is StableUnCLIPImg2ImgPipeline
    image = folders.images(1, 40)[0]

    def both(**changes: Any) -> None:
        request = {"image": image, "num_inference_steps": 4, "output_type": "np", **changes}
        theirs = twin(**request, generator=torch.Generator().manual_seed(5))
        require_same(pipe, pipe(**request, seed=5, noise="torch").images, theirs.images)

    both()
    both(noise_level=700, num_inference_steps=3, guidance_scale=4.0, prompt="a cat", negative_prompt="rain")
    assert pipe.programs.compilations == 1, "steps, scales, levels and prompts are data"


@pytest.mark.slow
def test_without_guidance_and_with_several_images(image_folder: Path) -> None:
    pipe, twin = opened(image_folder), reference("StableUnCLIPImg2ImgPipeline", image_folder)
    noised = twin.noise_image_embeddings
    twin.noise_image_embeddings = functools.partial(noised, noise=torch.tensor(EMBEDDING_NOISE))
    request = {"image": folders.images(2, 40), "prompt": PROMPTS, "num_inference_steps": 3, "output_type": "np"}
    for changes in ({"guidance_scale": 1.0}, {"noise_level": 30}):
        theirs = twin(**request, **changes, latents=torch.tensor(LATENTS.transpose(0, 3, 1, 2)))
        rows = {"image_embedding_noise": EMBEDDING_NOISE}
        require_same(pipe, pipe(**request, **changes, latents=LATENTS, rows=rows).images, theirs.images)


@pytest.mark.slow
def test_from_embeddings(image_folder: Path, from_image: Any) -> None:
    pipe, twin = from_image, reference("StableUnCLIPImg2ImgPipeline", image_folder)
    pixels = pipe.components["feature_extractor"](folders.images(1, 40)[0]).transpose(0, 3, 1, 2)
    embeds = twin.image_encoder(torch.tensor(pixels)).image_embeds.detach()
    request = {"image_embeds": embeds, "num_inference_steps": 3, "output_type": "np"}
    theirs = twin(**request, generator=torch.Generator().manual_seed(5))
    ours = pipe(**request | {"image_embeds": embeds.numpy()}, seed=5, noise="torch")
    require_same(pipe, ours.images, theirs.images)


def test_an_image_depends_on_its_own_arguments_alone(from_image: Any) -> None:
    images, request = folders.images(2, 40), {"num_inference_steps": 2, "output_type": "np"}
    both = from_image(images, PROMPTS, seed=[1, 2], noise_level=[0, 300], **request).images
    swapped = from_image(images[::-1], PROMPTS[::-1], seed=[2, 1], noise_level=[300, 0], **request).images
    np.testing.assert_allclose(both, swapped[::-1], atol=1e-4)
    other = from_image(images, PROMPTS, seed=[1, 2], noise_level=[0, 0], **request).images
    np.testing.assert_allclose(both[0], other[0], atol=1e-4)
    assert np.abs(both[1] - other[1]).mean() > 1e-3, "the noise level matters"


def test_saved_folders_open_in_diffusers(from_text: Any, from_image: Any, tmp_path: Path) -> None:
    for pipe in (from_text, from_image):
        pipe.save_pretrained(tmp_path / type(pipe).__name__)
        again = reference(type(pipe).__name__, tmp_path / type(pipe).__name__)
        assert type(again.image_normalizer) is folders.StableUnCLIPImageNormalizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "needs prompt"),
        ({"noise_level": 1000}, "noise_level must be a whole number from 0 to 999, got 1000"),
        ({"noise_level": 0.5}, "noise_level must be a whole number"),
        ({"noise": "torch", "seed": 0}, "takes no noise="),
        ({"prior_latents": PRIOR_NOISE[:1]}, r"latents must be \(2, 32\)"),
        ({"image": 1}, "has no argument image"),
    ],
)
def test_bad_arguments_from_prompts(from_text: Any, options: dict[str, Any], message: str) -> None:
    compiled = from_text.programs.compilations
    with pytest.raises((ValueError, TypeError), match=message):
        from_text.request(**{"prompt": PROMPTS, **options})
    assert from_text.programs.compilations == compiled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either image or image_embeds"),
        ({"image_embeds": np.zeros((1, 31), np.float32)}, r"image_embeds must be floating-point \[N,32\]"),
        ({"image_embeds": np.zeros((3, 32), np.float32), "prompt": PROMPTS}, "has 3 images for 2 prompts"),
        ({"strength": 0.5}, "has no argument strength"),
    ],
)
def test_bad_arguments_from_images(from_image: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        from_image.request(**options)


def test_networks_of_different_embeddings_are_refused(from_image: Any) -> None:
    pipe = from_image
    unet = pipe.components["unet"]
    wrong = pipe.replace(unet=(unet.clone(config=unet.config.replace(class_embed_type=None)), pipe.params["unet"]))
    with pytest.raises(ValueError, match="class_embed_type='projection' with an input of 64"):
        wrong.request(folders.images(1, 40)[0])


def test_a_call_is_checked_without_weights(text_folder: Path) -> None:
    pipe = configured_pipeline(text_folder)
    request = pipe.request(PROMPTS, **STEPS)
    assert request.rows["image_embeds"].shape == (2, 32)
    with pytest.raises(ValueError, match="noise_level must be a whole number"):
        pipe.request(PROMPTS, noise_level=-1)
