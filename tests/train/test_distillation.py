"""Latent consistency distillation from its command line: tiny networks, twelve real images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from diffuse_jax import DiffusionPipeline, LCMScheduler
from diffuse_jax.training.consistency import UNCONDITIONAL
from diffuse_jax.training.settings import Average, RunSettings
from tests.train.helpers import EMOJI, log, numbers, run
from tests.train.latent_models import SIZE, save_sd, save_sdxl

FULL, LORA = "lcm_distillation.py", "lcm_distillation_lora.py"
SAVE = {"sd": save_sd, "sdxl": save_sdxl}
WIDTH = 8
"""Width of the embedding of the guidance scale."""


def flags(model: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {"pretrained_teacher_model": model, "output_dir": output, "train_data_dir": EMOJI, "resolution": SIZE,
            "train_batch_size": 4, "learning_rate": 1e-3, "lr_warmup_steps": 0, "logging_steps": 1,
            "report_to": "none", "num_ddim_timesteps": 10} | more  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(tmp_path_factory.mktemp(name), fresh=False) for name, save in SAVE.items()}


SHARED = {"max_train_steps": 6, "checkpointing_steps": 4, "random_flip": True, "proportion_empty_prompts": 0.2}


def trained(script: str, given: dict[str, Any]) -> Path:
    """The folder of a run."""
    with pytest.MonkeyPatch.context() as patch:
        run(patch, script, devices=1, **given)
    return Path(given["output_dir"])


def require_same_when_resumed(script: str, given: dict[str, Any], folder: Path) -> None:
    """The same run resumed from its last checkpoint has the same results."""
    whole = Path(given["output_dir"])
    shutil.copytree(whole / "checkpoint-4", folder / "checkpoint-4")
    again = {name: value for name, value in given.items() if name != "validation_prompt"}
    trained(script, again | {"output_dir": folder, "resume_from_checkpoint": "latest"})
    assert log(whole)[4:] == log(folder)
    (file,) = (path.relative_to(whole / "checkpoint-4") for path in (whole / "checkpoint-4").rglob("*.safetensors"))
    end, other = (load_file(output / file) for output in (whole, folder))
    assert all(np.array_equal(end[key], other[key]) for key in {*end, *other})


@pytest.fixture(scope="module")
def of_student(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The flags of a whole student."""
    options = {"unet_time_cond_proj_dim": WIDTH, "loss_type": "huber", "validation_prompt": "heart",
               "num_validation_images": 1, "validation_steps": 6}  # fmt: skip
    return flags(models["sd"], tmp_path_factory.mktemp("student"), **SHARED, **options)


@pytest.fixture(scope="module")
def student(of_student: dict[str, Any]) -> Path:
    return trained(FULL, of_student)


@pytest.mark.slow  # checkpoints are those of every script
def test_a_whole_student_resumes_bit_for_bit(of_student: dict[str, Any], student: Path, tmp_path: Path) -> None:
    require_same_when_resumed(FULL, of_student, tmp_path)


@pytest.mark.slow  # what the script gives to `fit` is tested below, and a step compared with PyTorch's
def test_a_lora_resumes_bit_for_bit(models: dict[str, Path], tmp_path: Path) -> None:
    given = flags(models["sd"], tmp_path / "whole", **SHARED, lora_rank=4) | {"learning_rate": 1e-2}
    output = trained(LORA, given)
    require_same_when_resumed(LORA, given, tmp_path / "parts")
    tensors = load_file(output / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("unet.") for key in tensors)
    assert any("time_emb_proj.lora" in key for key in tensors)
    pipe = DiffusionPipeline.from_pretrained(models["sd"])
    pipe = pipe.replace(scheduler=LCMScheduler.from_config(pipe.scheduler))
    draw = lambda p: p("heart", num_inference_steps=4, guidance_scale=1.0, seed=0, output_type="np").images
    assert np.abs(draw(pipe.load_lora_weights(output)) - draw(pipe)).max() > 1e-4


def test_a_whole_student_takes_the_guidance_scale(models: dict[str, Path], student: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(student)
    assert type(pipe) is type(DiffusionPipeline.from_pretrained(models["sd"]))
    sampler = pipe.scheduler
    assert isinstance(sampler, LCMScheduler)
    assert (sampler.original_inference_steps, sampler.prediction_type) == (10, "v_prediction")
    assert pipe.components["unet"].config.time_cond_proj_dim == WIDTH
    draw = lambda scale: pipe("heart", num_inference_steps=4, guidance_scale=scale, seed=0, output_type="np").images
    weak, strong = draw(6.0), draw(16.0)
    assert np.abs(weak - strong).max() > 1e-5
    for part in ("vae", "text_encoder"):
        kind = type(pipe.components[part])
        pairs = zip(numbers(student, kind, part), numbers(models["sd"], kind, part), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    assert len(list((student / "validation").rglob("*.png"))) == 1


def given(monkeypatch: pytest.MonkeyPatch, script: str, **flags: Any) -> tuple[RunSettings, dict[str, Any]]:
    """The settings and the arguments with which a script calls ``fit``."""
    found: list[Any] = []
    monkeypatch.setattr("diffuse_jax.training.loop.fit", lambda *args, **options: found.extend((args[0], options)))
    run(monkeypatch, script, devices=1, **flags)
    return found[0], found[1]


def test_the_target_network_is_the_average_of_a_whole_student_and_of_a_lora_itself(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = flags(models["sd"], tmp_path, max_train_steps=1)
    whole, _ = given(monkeypatch, FULL, **options)
    assert whole.ema.use_ema
    assert whole.ema.average == Average(decay=0.95, ramp=False)
    assert not given(monkeypatch, FULL, **options, **{"no-use_ema": True})[0].ema.use_ema
    assert not given(monkeypatch, LORA, **options, lora_rank=2)[0].ema.use_ema


def test_what_is_cached_needs_no_network(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guidance still has its embeddings of no prompt, which for XL are zeros."""
    options = flags(models["sdxl"], tmp_path, max_train_steps=1, cache_latents=True, cache_text_embeddings=True)
    _, options = given(monkeypatch, FULL, **options)
    frozen = options["frozen"]
    assert set(frozen) == {"unet", UNCONDITIONAL}
    assert {name: row.shape for name, row in frozen[UNCONDITIONAL].items()} == {
        "states": (1, 16, 32),
        "pooled": (1, 16),
    }
    assert not any(np.any(row) for row in frozen[UNCONDITIONAL].values())


@pytest.mark.parametrize(
    ("script", "wrong", "message"),
    [
        (FULL, {"w_min": 20}, "--w_min 20 is above --w_max 15; exchange them"),
        (FULL, {"num_ddim_timesteps": 2000}, "--num_ddim_timesteps must be at most 1000"),
        (FULL, {"prediction_type": "epsilon", "validation_prompt": "a", "validation_inference_steps": 11},
         "leave 10 timesteps, fewer than the 11 steps asked for"),
        (FULL, {"lora_rank": 64}, "a LoRA is made by train/lcm_distillation_lora.py"),
        (FULL, {"snr_gamma": 5}, "distillation has a loss of its own, see --loss_type"),
        (FULL, {"teacher_revision": "main"}, "is called --revision here"),
        (FULL, {"train_text_encoder": True}, "unrecognized arguments: --train_text_encoder"),
        (LORA, {"lora_rank": 100}, "the LoRA rank must be at most"),
        (LORA, {"lora_alpha": 32}, "the alpha of a LoRA is its rank here"),
        (LORA, {"lora_dropout": 0.1}, "LoRA here has only --rank and --lora_targets"),
        (LORA, {"unet_time_cond_proj_dim": 8}, "unrecognized arguments: --unet_time_cond_proj_dim"),
        (LORA, {"train_shards_path_or_url": "x"}, "is called --train_shards here, and names files"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(
    script: str,
    wrong: dict[str, Any],
    message: str,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nor are weights read."""
    with pytest.raises((ValueError, SystemExit)) as caught:
        run(monkeypatch, script, **flags(models["sd"], tmp_path / "out", max_train_steps=1) | wrong)
    said = capsys.readouterr().err
    assert message in f"{caught.value} {said}"
    assert "loading" not in said
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_distilled_already_and_one_of_another_kind_are_refused(
    models: dict[str, Path], student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="has been distilled to few steps before; give the model that it was"):
        run(monkeypatch, LORA, **flags(student, tmp_path / "out", max_train_steps=1))
    shutil.copytree(models["sd"], tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "KandinskyV22Pipeline"))
    with pytest.raises(
        ValueError, match="is a KandinskyV22Pipeline; this trainer supports .*StableDiffusionXLPipeline"
    ):
        run(monkeypatch, FULL, **flags(tmp_path / "other", tmp_path / "out", max_train_steps=1))
