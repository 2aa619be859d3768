"""Reward tuning from its command line: a tiny network, and a reward that is easy to raise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffuse_jax import DiffusionPipeline
from diffuse_jax.models import CLIPVisionConfig, CLIPVisionModelWithProjection, UNet2DConditionModel
from diffuse_jax.training.families import family_of
from diffuse_jax.training.initial import initial_params
from tests.train.helpers import log, numbers, run
from tests.train.latent_models import UNET, save_sd, save_sdxl

REDNESS = """
def redness(images, prompts):
    return (images[..., 0] - images[..., 1:].mean(-1)).mean((1, 2))
"""
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_sd(tmp_path_factory.mktemp("sd"), fresh=False)
    # Other spacings go to timestep 1 before the last step, with so little noise that its density outweighs all others.
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"timestep_spacing": "trailing"}), encoding="utf-8")
    return folder


@pytest.fixture
def flags(sd: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\n", encoding="utf-8")
    (tmp_path / "mine.py").write_text(REDNESS, encoding="utf-8")
    return {
        "pretrained_model_name_or_path": sd,
        "output_dir": tmp_path / "out",
        "prompts": tmp_path / "prompts.txt",
        "reward": f"{tmp_path / 'mine.py'}:redness",
        "sample_num_steps": 3,
        "sample_guidance_scale": 2.0,
        "report_to": "none",
    }


DRAFT: dict[str, Any] = {"method": "draft", "train_batch_size": 8, "learning_rate": 2e-2, "gradient_steps": 1}
DDPO: dict[str, Any] = {
    "method": "ddpo", "train_batch_size": 8, "sample_batch_size": 16, "sample_num_batches_per_epoch": 1,
    "sample_guidance_scale": 1.0, "learning_rate": 2e-2, "train_clip_range": 0.05,
}  # fmt: skip


def test_draft_raises_the_reward(flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With validation images, and pairs that a pipeline takes."""
    shown = {"validation_prompt": "a cat", "num_validation_images": 1, "validation_inference_steps": 2}
    options = DRAFT | {"max_train_steps": 40, "checkpointing_steps": 20, "validation_steps": 40} | shown
    run(monkeypatch, "reward.py", devices=1, **flags | options)
    rewards = log(tmp_path / "out", "reward_mean")
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.05
    assert len(list((tmp_path / "out" / "validation").rglob("*.png"))) == 1
    assert (tmp_path / "out" / "checkpoint-20" / LORA).is_file()
    pipe = DiffusionPipeline.from_pretrained(flags["pretrained_model_name_or_path"])
    make = lambda pipe: pipe(["a cat"] * 8, num_inference_steps=3, seed=list(range(8)), output_type="np").images
    red = lambda images: float((images[..., 0] - images[..., 1:].mean(-1)).mean())
    assert red(make(pipe.load_lora_weights(tmp_path / "out"))) > red(make(pipe)) + 0.03


@pytest.mark.slow
def test_ddpo_raises_the_reward_and_resumes_bit_for_bit(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint, asked for within a round, is written at its end."""
    options = flags | DDPO | {"max_train_steps": 60, "checkpointing_steps": 55}
    run(monkeypatch, "reward.py", devices=1, **options)
    assert capsys.readouterr().err.count("checkpoints are written every 56 steps") == 1
    whole, parts = tmp_path / "out", tmp_path / "parts"
    rewards = log(whole, "reward_mean")
    assert np.mean(rewards[-6:]) > np.mean(rewards[:6]) + 0.008
    assert all(0 <= share <= 1 for share in log(whole, "clip_fraction"))
    position = json.loads((whole / "checkpoint-56" / "data-0.json").read_text())["batches"]
    assert (position["round"], position["update"]) == (28, 0)
    shutil.copytree(whole / "checkpoint-56", parts / "checkpoint-56")
    run(monkeypatch, "reward.py", devices=1, **options | {"output_dir": parts, "resume_from_checkpoint": "latest"})
    assert log(whole)[56:] == log(parts)
    end, again = (load_file(folder / LORA) for folder in (whole, parts))
    assert all(np.array_equal(end[name], again[name]) for name in end)


@pytest.mark.slow
def test_all_weights_become_a_pipeline(flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"no-use_lora": True, "max_train_steps": 2, "learning_rate": 1e-3}
    run(monkeypatch, "reward.py", devices=1, **flags | DDPO | options)
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "out")).__name__ == "StableDiffusionPipeline"
    before, after = (
        numbers(folder, UNet2DConditionModel, "unet")
        for folder in (flags["pretrained_model_name_or_path"], tmp_path / "out")
    )
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", [DRAFT, DDPO], ids=["draft", "ddpo"])
def test_xl_is_tuned_too(
    method: dict[str, Any], flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_sdxl(tmp_path / "xl", fresh=False)
    options = {"max_train_steps": 2, "pretrained_model_name_or_path": model}
    run(monkeypatch, "reward.py", devices=1, **flags | method | options)
    pipe = DiffusionPipeline.from_pretrained(model)
    changed = pipe.load_lora_weights(tmp_path / "out")
    before, after = (jax.tree.leaves(p.params["unet"]) for p in (pipe, changed))
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.slow  # the ordinary suite has rounds over several devices in tests/training/test_ddpo.py
@pytest.mark.parametrize("method", [DRAFT, DDPO], ids=["draft", "ddpo"])
def test_several_devices_give_the_result_of_one(
    method: dict[str, Any], flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for devices in (1, 8):
        share = {name: method[name] // devices for name in ("train_batch_size", "sample_batch_size") if name in method}
        output = tmp_path / str(devices)
        given = flags | method | share | {"max_train_steps": 2, "output_dir": output, "max_grad_norm": 1e9}
        run(monkeypatch, "reward.py", devices=devices, **given)
        found[devices] = log(output, "reward_mean"), load_file(output / LORA)
    np.testing.assert_allclose(found[8][0], found[1][0], rtol=1e-4, atol=1e-6)
    moved = np.sqrt(np.mean([np.mean(x**2) for name, x in found[1][1].items() if "up" in name or "lora_B" in name]))
    for name, x in found[1][1].items():
        assert np.sqrt(np.mean((found[8][1][name] - x) ** 2)) < 0.05 * moved, name


@pytest.fixture(scope="module")
def aesthetic(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The flags of an aesthetic predictor, two layers on a tiny CLIP."""
    folder, rng = tmp_path_factory.mktemp("aesthetic"), np.random.default_rng(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, image_size=16, patch_size=8,
        projection_dim=12,
    )  # fmt: skip
    network = CLIPVisionModelWithProjection(config)
    network.save_pretrained(folder / "clip", initial_params(network.shapes(), seed=0))
    sizes = {"0": (4, 12), "2": (1, 4)}
    tensors = {f"layers.{k}.weight": rng.standard_normal(size).astype(np.float32) for k, size in sizes.items()}
    tensors |= {f"layers.{k}.bias": np.zeros(size[0], np.float32) for k, size in sizes.items()}
    save_file(tensors, folder / "head.safetensors")
    paths = {"aesthetic_model_path": folder / "head.safetensors", "clip_model_path": folder / "clip"}
    return {"reward": "aesthetic", **paths}


@pytest.mark.slow
def test_draft_raises_the_aesthetic_reward(
    aesthetic: dict[str, Any], flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "reward.py", devices=1, **flags | aesthetic | DRAFT | {"max_train_steps": 30})
    rewards, spread = (log(tmp_path / "out", name) for name in ("reward_mean", "reward_std"))
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.5 * np.mean(spread[:5])


def test_what_has_been_distilled_is_refused(
    sd: Path, flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its UNet says, which takes the guidance scale as an input, or its sampler, whatever its class."""
    for name, path, words in (
        ("embedding", "unet/config.json", {"time_cond_proj_dim": 8}),
        ("sampler", "scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}),
    ):
        shutil.copytree(sd, tmp_path / name)
        file = tmp_path / name / path
        file.write_text(json.dumps(json.loads(file.read_text()) | words))
        with pytest.raises(ValueError, match=f"{name} .*distilled .*before; give the model that it was distilled from"):
            run(monkeypatch, "reward.py", devices=1, **flags | {"pretrained_model_name_or_path": tmp_path / name})
    with pytest.raises(ValueError, match="it has been distilled before; give the model"):
        family_of("StableDiffusionPipeline", "x").check({"unet": UNET.replace(time_cond_proj_dim=8)}, "x is one")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "jpeg_compressibility", "method": "draft"}, "computed on the host and has no gradient"),
        ({"reward": "no_such_module:f"}, "No module named"),
        ({"prompts": "none.txt"}, "none.txt"),
        ({"resolution": 17}, "--resolution must be a multiple of 2, got 17"),
        ({"sample_batch_size": 3, "sample_num_batches_per_epoch": 1, "train_batch_size": 2}, "cannot be divided"),
        ({"sample_num_steps": 2000}, "num_inference_steps .*2000"),
        ({"no-use_lora": True, "rank": 8}, "--rank is about low-rank pairs, and --no-use_lora trains none"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    options: dict[str, Any], message: str, flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        run(monkeypatch, "reward.py", devices=1, **flags | options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["StableDiffusionInpaintPipeline", "StableDiffusionDiffEditPipeline"])
def test_models_that_take_images_are_refused(
    kind: str, sd: Path, flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sd, tmp_path / "sd")
    index = tmp_path / "sd" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", kind))
    with pytest.raises(ValueError, match=f"a {kind} makes images from other images; rewards are of images from prompt"):
        run(monkeypatch, "reward.py", devices=1, **flags | {"pretrained_model_name_or_path": tmp_path / "sd"})


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("prompt_fn", "give a file of --prompts"),
        ("train_learning_rate", "is called --learning_rate here"),
        ("truncated_backprop_timestep", "is --gradient_steps here"),
        ("train_text_encoder", "only the UNet is tuned"),
    ],
)
def test_flags_of_trl_are_refused_by_name(
    flag: str, advice: str, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "reward.py", **flags | {flag: 1})
    assert f"--{flag}: " in (said := capsys.readouterr().err)
    assert advice in said
