"""Prior and decoder of Kandinsky 2.2 in one pipeline: what both give one after the other, opened in every way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax.pipelines import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    KandinskyV22CombinedPipeline,
)
from diffuse_jax.pipelines.configured import configured_pipeline
from diffuse_jax.pipelines.programs import Programs
from diffuse_jax.weights import WeightsError

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")

diffusers = folders.diffusers

SIZE = {"height": 64, "width": 64}
STEPS = {"num_inference_steps": 2, "prior_num_inference_steps": 3}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("combined")
    return folders.kandinsky_prior(root / "prior"), folders.kandinsky_decoder(root / "decoder")


def test_both_stages_in_one(parts: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = parts
    prior, decoder = (DiffusionPipeline.from_pretrained(folder) for folder in parts)
    pipe = AutoPipelineForText2Image.from_pretrained(second, prior=first).replace(programs=Programs())
    assert type(pipe) is KandinskyV22CombinedPipeline
    request: dict[str, Any] = {"prompt": ["a cat", "x"], "negative_prompt": "rain", "num_images_per_prompt": 2}
    ours = pipe(**request, **STEPS, **SIZE, seed=4, prior_guidance_scale=2.0, output_type="np").images
    embeds = prior(**request, num_inference_steps=3, seed=4, guidance_scale=2.0)
    wanted = decoder(**embeds, **SIZE, num_inference_steps=2, seed=4, output_type="np").images
    np.testing.assert_allclose(ours, wanted, atol=1e-4)
    assert pipe.programs.compilations == 2
    changes = {"num_inference_steps": 3, "prior_num_inference_steps": 2, "guidance_scale": 2.0}
    pipe(**request, **SIZE, **changes, output_type="np")
    assert pipe.programs.compilations == 2, "steps, scales and seeds are data"

    seen: list[int] = []
    found = pipe.request(**request, **STEPS, **SIZE, prior_callback_on_step_end=lambda p, i, t, x: seen.append(i))
    assert seen == [0, 1, 2] and found.seeds is not None
    with pytest.raises(ValueError, match="takes no noise="):
        pipe.request(**request, **STEPS, **SIZE, noise="torch", seed=0)
    with pytest.raises(TypeError, match="has no argument clip_skip"):
        pipe.request(**request, clip_skip=1)
    with pytest.raises(TypeError, match="prompt must be a string or a list"):
        pipe.request()

    pipe.save_pretrained(tmp_path / "model")
    diffusers.KandinskyV22CombinedPipeline.from_pretrained(tmp_path / "model")
    again = DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert type(again) is KandinskyV22CombinedPipeline
    assert configured_pipeline(tmp_path / "model").request(**request, **STEPS, **SIZE).images == 4, "checked, not run"
    task = AutoPipelineForImage2Image.from_pipe(again)
    assert type(task).__name__ == "KandinskyV22Img2ImgCombinedPipeline" and task.params["unet"] is again.params["unet"]
    image = folders.images(1, 64)[0]
    assert task.request("a cat", image, **STEPS, **SIZE, strength=0.5, seed=1).rows["initial_image"].shape[0] == 1


def test_the_prior_is_given_or_in_the_card(parts: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = parts
    prior = DiffusionPipeline.from_pretrained(first)
    pipe = KandinskyV22CombinedPipeline.from_pretrained(second, prior=prior)
    assert pipe.params["prior_prior"] is prior.params["prior"], "an open prior is shared"
    with pytest.raises(WeightsError, match="names no prior; give prior="):
        KandinskyV22CombinedPipeline.from_pretrained(second)
    (second / "README.md").write_text(f"---\nlicense: apache-2.0\nprior:\n- {first}\ntags:\n- x\n---\n# Decoder\n")
    pipe = KandinskyV22CombinedPipeline.from_pretrained(second)
    assert pipe.prior_pipe.components["prior"] == prior.components["prior"]
