"""The prior of Kandinsky 2.2 against PyTorch diffusers, with its own noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax.pipelines import DiffusionPipeline, KandinskyV22PriorEmb2EmbPipeline, KandinskyV22PriorPipeline
from diffuse_jax.pipelines.programs import Programs
from tests.oracle.comparisons import difference

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")

torch, diffusers = folders.torch, folders.diffusers

TOLERANCE = 1e-4
PROMPTS = ["a cat", "two red houses"]
SHORT = {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.kandinsky_prior(tmp_path_factory.mktemp("prior") / "model")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder).replace(programs=Programs())


def require_same_embeddings(ours: Any, theirs: Any) -> None:
    for name in ("image_embeds", "negative_image_embeds"):
        wanted = getattr(theirs, name)
        assert difference(getattr(ours, name), wanted.numpy()) < TOLERANCE, name


def compare(pipe: Any, twin: Any, **request: Any) -> None:
    """With one generator for all prompts, as PyTorch diffusers draws."""
    twin.set_progress_bar_config(disable=True)
    folders.exact(twin.scheduler)
    with torch.no_grad():
        wanted = twin(generator=torch.Generator().manual_seed(5), **request)
    require_same_embeddings(pipe(seed=5, noise="torch", **request), wanted)


def test_prior(folder: Path, pipe: Any) -> None:
    twin = diffusers.KandinskyV22PriorPipeline.from_pretrained(folder)
    assert type(pipe) is KandinskyV22PriorPipeline
    compare(pipe, twin, prompt=PROMPTS, **SHORT)
    assert pipe.programs.compilations == 1
    compare(pipe, twin, prompt=PROMPTS, num_inference_steps=3, guidance_scale=2.0)
    assert pipe.programs.compilations == 1, "steps, scales and seeds are data"
    compare(pipe, twin, prompt="a cat", **SHORT, negative_prompt="rain")


@pytest.mark.slow
def test_prior_without_guidance_and_with_several_images(folder: Path, pipe: Any) -> None:
    twin = diffusers.KandinskyV22PriorPipeline.from_pretrained(folder)
    compare(pipe, twin, prompt=PROMPTS, **SHORT, guidance_scale=1.0)
    compare(pipe, twin, prompt="a cat", **SHORT, negative_prompt="rain", guidance_scale=0.0)
    compare(pipe, twin, prompt=["a cat"], **SHORT, num_images_per_prompt=2)


def test_prior_from_an_image(folder: Path, pipe: Any) -> None:
    image = folders.images(1, 40)[0]
    twin = diffusers.KandinskyV22PriorEmb2EmbPipeline.from_pretrained(folder)
    ours = KandinskyV22PriorEmb2EmbPipeline.from_pipe(pipe).replace(programs=Programs())
    compare(ours, twin, prompt="a cat", image=image, strength=0.6, num_inference_steps=8)
    compiled = ours.programs.compilations
    compare(ours, twin, prompt="a cat", image=image, strength=0.9, num_inference_steps=5, guidance_scale=2.0)
    assert ours.programs.compilations == compiled, "the strength is data"
    compare(ours, twin, prompt="a cat", image=image, strength=0.5, num_inference_steps=4, negative_prompt="rain")
    # Embeddings take the place of the image that they are of.
    embeds = pipe.interpolate([image], [1.0], **SHORT, seed=0).image_embeds
    request = {"strength": 0.6, "seed": 3, **SHORT}
    require = ours("a cat", image, **request).image_embeds
    np.testing.assert_allclose(ours("a cat", np.asarray(embeds), **request).image_embeds, require, atol=1e-5)


def test_interpolation(folder: Path, pipe: Any) -> None:
    image = folders.images(1, 40)[0]
    twin = diffusers.KandinskyV22PriorPipeline.from_pretrained(folder)
    request = SHORT | {"seed": 1}
    same = pipe.interpolate(["a cat", image], [0.25, 0.5], **request)
    with torch.no_grad():
        pixels = twin.image_processor(image, return_tensors="pt").pixel_values
        seen = twin.image_encoder(pixels).image_embeds.numpy()
        zero = twin.get_zero_embed(1).numpy()
    cat = np.asarray(pipe("a cat", **request).image_embeds)
    np.testing.assert_allclose(same.image_embeds, 0.25 * cat + 0.5 * seen, atol=1e-4)
    np.testing.assert_allclose(same.negative_image_embeds, zero, atol=1e-4)
    negative = pipe.interpolate([image], [1.0], negative_prompt="rain", **request).negative_image_embeds
    np.testing.assert_allclose(negative, pipe("rain", **request).image_embeds, atol=1e-5)
    with pytest.raises(ValueError, match="one weight for each image or prompt; got 1 weights for 2"):
        pipe.interpolate(["a cat", image], [1.0])


def test_a_prompt_is_the_same_in_any_batch_and_the_output_unpacks(pipe: Any) -> None:
    request = SHORT | {"negative_prompt": "rain"}
    both = pipe(PROMPTS, seed=[1, 2], **request)
    alone = pipe(PROMPTS[1], seed=[2], **request)
    image_embeds, negative_image_embeds = alone.to_tuple()
    np.testing.assert_allclose(both.image_embeds[1], image_embeds[0], atol=1e-4)
    np.testing.assert_allclose(both.negative_image_embeds[1], negative_image_embeds[0], atol=1e-4)
    assert {**alone} == {"image_embeds": image_embeds, "negative_image_embeds": negative_image_embeds}
    assert isinstance(image_embeds, jax.Array) and image_embeds.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "prompt must be a string or a list"),
        ({"output_type": "pil"}, "output_type must be 'jax' or 'np' for embeddings, got 'pil'"),
        ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt has 3 entries for 2 prompts"),
        ({"negative_prompt": "rain", "noise": "torch", "seed": 0}, "takes one image, got 2"),
        ({"clip_skip": 1}, "has no argument clip_skip"),
    ],
)
def test_bad_arguments(pipe: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        pipe.request(**{"prompt": PROMPTS} | changes)


def test_a_saved_folder_opens_in_diffusers(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "again")
    again = diffusers.KandinskyV22PriorPipeline.from_pretrained(tmp_path / "again")
    compare(pipe, again, prompt="a cat", **SHORT)
