"""Training a Stable Diffusion for inpainting, from the command lines of the scripts for text to image."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from diffuse_jax import StableDiffusionInpaintPipeline
from diffuse_jax.models import UNet2DConditionModel
from tests.train.helpers import EMOJI, log, numbers, run
from tests.train.latent_models import SIZE, save_inpainting
from tests.train.test_latent import fell, flags


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inpainting(tmp_path_factory.mktemp("inpainting"))


@pytest.mark.slow
def test_it_learns_twelve_images_and_resumes_bit_for_bit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = flags(model, tmp_path / "out", train_data_dir=EMOJI, max_train_steps=60, checkpointing_steps=58)
    run(monkeypatch, "text_to_image.py", devices=1, **options)
    assert fell(log(tmp_path / "out")) < 0.9
    shutil.copytree(tmp_path / "out" / "checkpoint-58", tmp_path / "again" / "checkpoint-58")
    resumed = options | {"output_dir": tmp_path / "again", "resume_from_checkpoint": "latest"}
    run(monkeypatch, "text_to_image.py", devices=1, **resumed)
    ends = (numbers(tmp_path / name, UNet2DConditionModel, "unet") for name in ("out", "again"))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)

    pipe = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "out")
    image, mask = Image.new("RGB", (SIZE, SIZE), "red"), Image.new("L", (SIZE, SIZE), 255)
    assert pipe("a", image=image, mask_image=mask, num_inference_steps=2, seed=0).images[0].size == (SIZE, SIZE)


@pytest.mark.slow
def test_dreambooth_with_lora_and_text_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_inpainting(tmp_path / "model", fresh=False)  # a new network predicts zeros, whatever its pairs are
    more = {"instance_data_dir": EMOJI, "instance_prompt": "a", "max_train_steps": 2, "train_text_encoder": True}
    run(monkeypatch, "dreambooth_lora.py", devices=1, **flags(model, tmp_path / "out", **more))
    pipe = StableDiffusionInpaintPipeline.from_pretrained(model)
    tuned = pipe.load_lora_weights(tmp_path / "out")
    for name in ("unet", "text_encoder"):
        before, after = (jax.tree.leaves(x.params[name]) for x in (pipe, tuned))
        assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("script", "wrong", "message"),
    [
        (
            "text_to_image.py",
            {"cache_latents": True},
            "--cache_latents cannot be used with StableDiffusionInpaint",
        ),
        (
            "text_to_image.py",
            {"validation_prompt": "a"},
            "--validation_prompt cannot be used with .*it repaints",
        ),
        (
            "controlnet.py",
            {"conditioning": "canny"},
            "has a UNet for inpainting, which is trained by text to image",
        ),
        ("lcm_distillation.py", {}, "has a UNet for inpainting"),
    ],
)
def test_what_makes_no_sense_is_refused(
    script: str, wrong: dict[str, Any], message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, script, devices=1, **flags(model, tmp_path / "out", train_data_dir=EMOJI, **wrong))
    assert not (tmp_path / "out").exists()


def test_class_images_must_be_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"with_prior_preservation": True, "class_prompt": "a", "class_data_dir": tmp_path / "dogs"}
    options = flags(model, tmp_path / "out", instance_data_dir=EMOJI, instance_prompt="a", **kept, max_train_steps=1)
    with pytest.raises(ValueError, match="has 0 of 100 images, and a StableDiffusionInpaintPipeline cannot make the"):
        run(monkeypatch, "dreambooth.py", devices=1, **options)
