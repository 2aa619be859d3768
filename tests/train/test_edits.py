"""InstructPix2Pix from its command line: a tiny network learns to colour real images, and PyTorch opens its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from diffuse_jax import DiffusionPipeline
from diffuse_jax.models import UNet2DConditionModel
from diffuse_jax.pipelines import StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline
from diffuse_jax.training.editing import with_image_channels
from tests.train.helpers import EMOJI, log, numbers, run
from tests.train.latent_models import SIZE, save_sd, save_sdxl


def edits_of(folder: Path, output: Path) -> Path:
    """An image folder with the same images, those before the edit in shades of grey, and instructions."""
    shutil.copytree(folder, output)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (output / "grey").mkdir()
    for line in lines:
        line["input_image"] = f"grey/{line['file_name']}"
        Image.open(output / line["file_name"]).convert("L").save(output / line["input_image"])
        line["edit_prompt"] = f"colour the {line.pop('text').split(',')[0]}"
    (output / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return output


def flags(model: Path, output: Path, data: Path, **more: Any) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": model, "output_dir": output, "train_data_dir": data, "resolution": SIZE,
            "train_batch_size": 8, "learning_rate": 1e-2, "lr_warmup_steps": 0, "logging_steps": 1,
            "report_to": "none"} | more  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a training run, and its flags."""
    folder = tmp_path_factory.mktemp("edits")
    model, data = save_sd(folder / "model"), edits_of(EMOJI, folder / "data")
    options: dict[str, Any] = {
        "max_train_steps": 30, "checkpointing_steps": 25, "random_flip": True, "conditioning_dropout_prob": 0.1,
        "use_ema": True, "ema_decay": 0.9, "validation_prompt": "colour the heart", "num_validation_images": 1,
        "validation_image": data / "grey" / "red-apple.png", "validation_inference_steps": 2, "validation_steps": 30,
    }  # fmt: skip
    given = flags(model, folder / "whole", data, **options)
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "instruct_pix2pix.py", devices=1, **given)
    return folder / "whole", given


def test_it_learns(trained: tuple[Path, dict[str, Any]]) -> None:
    output, _ = trained
    losses = log(output)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    assert len(list((output / "validation").rglob("*.png"))) == 2, "the original image is shown too"


@pytest.mark.slow  # checkpoints are those of every script
def test_it_resumes_bit_for_bit(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, given = trained
    shutil.copytree(whole / "checkpoint-25", tmp_path / "checkpoint-25")
    again = given | {"output_dir": tmp_path, "resume_from_checkpoint": "latest"}
    run(monkeypatch, "instruct_pix2pix.py", devices=1, **again)
    assert log(whole)[25:] == log(tmp_path)
    ends = (numbers(folder, UNet2DConditionModel, "unet") for folder in (whole, tmp_path))
    assert all(np.array_equal(a, b) for a, b in zip(*ends, strict=True))


def test_its_folder_is_a_pipeline_that_follows_the_image(trained: tuple[Path, dict[str, Any]]) -> None:
    output, given = trained
    pipe = DiffusionPipeline.from_pretrained(output)
    assert type(pipe) is StableDiffusionInstructPix2PixPipeline
    grey = np.asarray(Image.open(given["validation_image"]).convert("RGB").resize((SIZE, SIZE)))
    edit = lambda image: pipe("colour the apple", image=image, num_inference_steps=2, seed=0, output_type="np").images
    assert np.abs(edit(grey) - edit(grey[::-1])).max() > 1e-3


def test_pytorch_opens_its_folder(trained: tuple[Path, dict[str, Any]]) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs PyTorch diffusers")
    pytest.importorskip("torch", reason="needs PyTorch diffusers")
    output, _ = trained
    theirs = diffusers.DiffusionPipeline.from_pretrained(output)
    assert type(theirs).__name__ == "StableDiffusionInstructPix2PixPipeline"
    assert theirs.unet.config.in_channels == 8
    ours = UNet2DConditionModel.from_pretrained(output, subfolder="unet")[1]["conv_in"]["kernel"]
    np.testing.assert_array_equal(theirs.unet.conv_in.weight.detach().numpy().transpose(2, 3, 1, 0), np.asarray(ours))


@pytest.mark.slow
def test_latents_of_both_images_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For XL; with the embeddings of the instructions, so neither the autoencoder nor the text encoders are needed."""
    model, data = save_sdxl(tmp_path / "model", fresh=False), edits_of(EMOJI, tmp_path / "data")
    # The second step's loss depends on the first one's update, and so on the latents of the original images.
    options = {"max_train_steps": 2, "conditioning_dropout_prob": 0.1, "center_crop": True}
    run(monkeypatch, "instruct_pix2pix.py", devices=1, **flags(model, tmp_path / "plain", data, **options))
    options |= {"cache_latents": True, "cache_text_embeddings": True}
    run(monkeypatch, "instruct_pix2pix.py", devices=1, **flags(model, tmp_path / "cached", data, **options))
    np.testing.assert_allclose(log(tmp_path / "plain"), log(tmp_path / "cached"), rtol=1e-4)
    index = json.loads((tmp_path / "cached" / "model_index.json").read_text())
    assert index["_class_name"] == StableDiffusionXLInstructPix2PixPipeline.__name__


def test_new_channels_change_nothing_at_first(tmp_path: Path, rng: np.random.Generator) -> None:
    pipe = DiffusionPipeline.from_pretrained(save_sd(tmp_path, fresh=False))
    more = with_image_channels(pipe)
    x, states = rng.standard_normal((1, 8, 8, 8), np.float32), rng.standard_normal((1, 3, 16), np.float32)
    predict = lambda pipe, x: jax.jit(pipe.components["unet"].apply)({"params": pipe.params["unet"]}, x, 7, states)
    np.testing.assert_allclose(predict(pipe, x[..., :4]), predict(more, x), atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"original_image_column": "before"}, "no control image under 'before'"),
        ({"edit_prompt_column": "words"}, "no column 'words'"),
        ({"validation_image": "a.png"}, "got 1 images and 0 prompts"),
        ({"conditioning_dropout_prob": 0.4}, "must be a number from 0 to 1/3, got 0.4"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    wrong: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, data = save_sd(tmp_path / "model"), edits_of(EMOJI, tmp_path / "data")
    with pytest.raises((ValueError, OSError, SystemExit)) as caught:
        run(monkeypatch, "instruct_pix2pix.py", **flags(model, tmp_path / "out", data, max_train_steps=1, **wrong))
    said = capsys.readouterr().err
    assert message in f"{caught.value} {said}"
    assert "loading" not in said
    assert not (tmp_path / "out").exists()
