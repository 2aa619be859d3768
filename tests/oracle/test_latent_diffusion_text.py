"""Latent diffusion's text to image against PyTorch diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax import AutoPipelineForText2Image, LDMTextToImagePipeline
from diffuse_jax.pipelines.programs import Programs
from diffuse_jax.weights import WeightsError, read_json
from tests.oracle.agreement import require_same

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
torch, diffusers = folders.torch, folders.diffusers

PROMPTS = ["a cat", "Two DOGS!"]
SHORT = {"prompt": PROMPTS, "num_inference_steps": 4, "guidance_scale": 5.0}


def opened(folder: Path) -> tuple[LDMTextToImagePipeline, Any]:
    """The pipeline here, without programs of other tests, and in PyTorch."""
    pipe = AutoPipelineForText2Image.from_pretrained(folder)
    assert type(pipe) is LDMTextToImagePipeline
    twin = diffusers.LDMTextToImagePipeline.from_pretrained(folder)
    twin.set_progress_bar_config(disable=True)
    return pipe.replace(programs=Programs()), twin


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[LDMTextToImagePipeline, Any]:
    return opened(folders.latent_diffusion_text(tmp_path_factory.mktemp("ldm") / "model"))


def compare(pipe: Any, twin: Any, latents: np.ndarray, **request: Any) -> None:
    with torch.no_grad():
        given = torch.tensor(latents.transpose(0, 3, 1, 2))
        wanted = twin(latents=given, output_type="np", **request).images
    require_same(pipe, pipe(latents=latents, output_type="np", **request).images, wanted)


def test_images_equal_those_of_pytorch(pair: Any, rng: np.random.Generator) -> None:
    pipe, twin = pair
    latents = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    for changes in ({}, {"num_inference_steps": 20}, {"guidance_scale": 2.0}, {"prompt": ["", "it's (7:2)"]}):
        compare(pipe, twin, latents, **SHORT | changes)
    pipe(PROMPTS, num_inference_steps=3, guidance_scale=3.0, seed=5, output_type="np", eta=0.5)
    first = pipe.programs.compilations
    compare(pipe, twin, latents, **SHORT | {"guidance_scale": 1.0})
    assert pipe.programs.compilations == first + 1, "without guidance is another program"
    assert first <= 2, "one from latents, one from seeds; steps, guidance and prompts are data"


def test_the_default_has_no_guidance_and_50_steps(pair: Any) -> None:
    request = pair[0].request("a")
    assert request.plan.num_evaluations == 50
    assert request.rows["ids"]["bert"].shape == (1, 77)
    assert request.method.latent_shape == (8, 8, 4)
    assert request.rows["guidance_scale"].tolist() == [1.0]


@pytest.mark.slow
def test_a_quantising_autoencoder(tmp_path: Path, rng: np.random.Generator) -> None:
    pipe, twin = opened(folders.latent_diffusion_text(tmp_path / "vq", "VQModel"))
    compare(pipe, twin, rng.standard_normal((2, 8, 8, 4)).astype(np.float32), **SHORT)


def test_pytorch_opens_what_we_save(pair: Any, tmp_path: Path) -> None:
    pipe, twin = pair
    pipe.save_pretrained(tmp_path)
    assert read_json(tmp_path / "model_index.json")["bert"] == ["latent_diffusion", "LDMBertModel"]
    again = diffusers.LDMTextToImagePipeline.from_pretrained(tmp_path)
    assert again.tokenizer(PROMPTS)["input_ids"] == twin.tokenizer(PROMPTS)["input_ids"]
    for name in ("bert", "unet", "vqvae"):
        before, after = getattr(twin, name).state_dict(), getattr(again, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_weighted_prompts_negative_prompts_and_embeddings(pair: Any) -> None:
    pipe = pair[0]
    rows = pipe.request("a (cat:1.3)", prompt_syntax="a1111", long_prompts=True).rows
    assert rows["ids"]["bert"].shape == (1, 1, 1, 77)
    assert rows["text_weights"]["bert"].max() == np.float32(1.3)
    given = np.zeros((1, 77, 32), np.float32)
    states = pipe.request(prompt_embeds=given, negative_prompt="dull", guidance_scale=2.0).rows["states"]
    assert states.values.shape == (1, 2, 77, 32)
    assert np.abs(states.values[0, 0]).max() > 0
    assert not states.values[0, 1].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 60}, "height must be a multiple of 8, got 60; try 56 or 64"),
        ({"clip_skip": 1}, "clip_skip"),
        (
            {"prompt_embeds": np.zeros((1, 77, 8), np.float32), "prompt": None},
            r"\[1, L, 32\], got float32 \[1, 77, 8\]",
        ),
    ],
)
def test_bad_arguments_are_refused(pair: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        pair[0].request(**{"prompt": "a"} | options)


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = folders.latent_diffusion_text(tmp_path / "model")
    for file in ("tokenizer.json", "vocab.txt"):
        (folder / "tokenizer" / file).unlink(missing_ok=True)
    with pytest.raises(WeightsError, match="expected vocab.txt, or tokenizer.json|cannot read a Bert tokenizer"):
        LDMTextToImagePipeline.from_pretrained(folder)
