"""``train/unconditional.py`` from its command line, on twelve emoji."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from diffuse_jax.models import UNet2DModel
from diffuse_jax.models.unet_2d import UNet2DConfig
from diffuse_jax.pipelines import ConsistencyModelPipeline, DDPMPipeline, DiffusionPipeline
from diffuse_jax.schedulers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, Scheduler
from diffuse_jax.training.initial import initial_params
from tests.train.helpers import EMOJI, load, log, numbers, run

CONFIG = UNet2DConfig(
    block_out_channels=(16,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    layers_per_block=1, norm_num_groups=4, mid_block_type=None,
)  # fmt: skip
TWO_LEVELS = CONFIG.replace(
    block_out_channels=(16, 16), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
)


OTHERS = {
    "edm": (ConsistencyModelPipeline, EDMEulerScheduler()),
    "flow_matching": (DDPMPipeline, FlowMatchEulerDiscreteScheduler()),
}
"""Objectives besides that of DDPM -> the class of the folder, and its sampler."""


def network(folder: Path, config: UNet2DConfig) -> Path:
    """A folder with a config only."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(UNet2DModel(config).config_json()))
    return folder


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Flags of a small training: a new network on 16 pixels, one image per device."""
    return {
        "model_config_name_or_path": network(tmp_path / "net", CONFIG),
        "train_data_dir": EMOJI,
        "output_dir": tmp_path / "out",
        "resolution": 16,
        "train_batch_size": 1,
        "learning_rate": 1e-2,
        "lr_warmup_steps": 1,
        "logging_steps": 1,
        "eval_batch_size": 0,
        "report_to": "none",
    }


def test_images_are_learned(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {
        "max_train_steps": 60,
        "train_batch_size": 8,
        "checkpointing_steps": 50,
        "use_ema": True,
        "center_crop": True,
    }
    run(monkeypatch, "unconditional.py", devices=1, **options | more)
    assert np.mean(log(tmp_path / "out")[-10:]) < 0.4 * log(tmp_path / "out")[0]
    pipe = DDPMPipeline.from_pretrained(tmp_path / "out")
    images = pipe(2, num_inference_steps=5, seed=0, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all()
    assert DDPMPipeline.from_pretrained(tmp_path / "out" / "checkpoint-50").scheduler == pipe.scheduler


@pytest.mark.parametrize("objective", [pytest.param("edm", marks=pytest.mark.slow), "flow_matching"])
def test_images_are_learned_by_another_objective(
    objective: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss falls by more than half, and samples come closer to the mean and spread of the emoji's pixels."""
    kind, scheduler = OTHERS[objective]
    more = {"max_train_steps": 100, "train_batch_size": 8, "center_crop": True, "objective": objective}
    shown = {"eval_batch_size": 2, "ddpm_num_inference_steps": 3, "validation_steps": 100, "use_ema": True}
    run(monkeypatch, "unconditional.py", devices=1, **options | more | shown)
    losses = log(tmp_path / "out")
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:2])
    assert len(list((tmp_path / "out" / "validation" / "step-100").glob("*.png"))) == 2
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe) is kind
    assert pipe.scheduler == scheduler
    images = pipe(8, num_inference_steps=20, seed=0, output_type="np").images
    unet = pipe.components["unet"]
    new = pipe.replace(unet=(unet, initial_params(unet, 0)))(8, num_inference_steps=20, seed=0, output_type="np").images
    real = np.stack([np.asarray(Image.open(f).convert("RGB").resize((16, 16))) for f in EMOJI.glob("*.png")]) / 255
    far = lambda x: abs(x.mean() - real.mean()) + abs(x.std() - real.std())
    assert far(images) < 0.5 * far(new)


@pytest.mark.parametrize(
    ("objective", "own"),
    [
        ("edm", {"sigma_data": 0.4, "p_mean": -1, "noise_offset": 0.1}),
        pytest.param(
            "flow_matching",
            {"weighting_scheme": "mode", "mode_scale": -0.5, "flow_shift": 2},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_resumed_run_of_another_objective(
    objective: str, own: dict[str, Any], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit as an uninterrupted one; then the folder is trained further, and keeps its sampler."""
    wanted = options | own | {"objective": objective, "max_train_steps": 4, "checkpointing_steps": 2}
    run(monkeypatch, "unconditional.py", devices=1, **wanted)
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    resumed = {"output_dir": tmp_path / "again", "resume_from_checkpoint": "latest"}
    run(monkeypatch, "unconditional.py", devices=1, **wanted | resumed)
    assert log(tmp_path / "again") == log(tmp_path / "out")[2:]
    ends = (numbers(tmp_path / name, UNet2DModel, "unet") for name in ("out", "again"))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)
    changed = {"edm": "sigma_data", "flow_matching": "flow_shift"}[objective]
    for other, flag in ((options | {"objective": "ddpm"}, "objective"), (wanted | {changed: 0.7}, changed)):
        with pytest.raises(ValueError, match=f"checkpoint-4 was trained with --{flag} "):
            run(monkeypatch, "unconditional.py", **other | resumed)

    del options["model_config_name_or_path"]
    further = options | {"pretrained_model_name_or_path": tmp_path / "out", "output_dir": tmp_path / "further"}
    with pytest.raises(ValueError, match=f"Scheduler: give --objective {objective}, or, to start --objective ddpm "):
        run(monkeypatch, "unconditional.py", **further)
    run(monkeypatch, "unconditional.py", devices=1, **further, objective=objective, max_train_steps=2)
    schedulers = [Scheduler.from_pretrained(tmp_path / name, subfolder="scheduler") for name in ("out", "further")]
    assert schedulers[0] == schedulers[1] != OTHERS[objective][1]


def test_validation_images_on_a_mesh_in_bfloat16(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {"eval_batch_size": 3, "ddpm_num_inference_steps": 2, "validation_steps": 1}
    more = {"max_train_steps": 2, "mesh_fsdp": 4, "mixed_precision": "bf16", "gradient_checkpointing": True}
    run(monkeypatch, "unconditional.py", **options | shown | more)
    for step in (1, 2):
        files = sorted((tmp_path / "out" / "validation" / f"step-{step}").glob("*.png"))
        assert [Image.open(file).size for file in files] == [(16, 16)] * 3
    assert {array.dtype for array in numbers(tmp_path / "out", UNet2DModel, "unet")} == {np.dtype(np.float32)}


def test_a_resumed_run_equals_an_uninterrupted_one(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"max_train_steps": 4, "checkpointing_steps": 2, "use_ema": True, "random_flip": True}
    wanted = options | more | {"gradient_accumulation_steps": 1, "snr_gamma": 5, "prediction_type": "v_prediction"}
    run(monkeypatch, "unconditional.py", **wanted)
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    resumed = {"output_dir": tmp_path / "again", "resume_from_checkpoint": "latest"}
    run(monkeypatch, "unconditional.py", **wanted | resumed)
    assert log(tmp_path / "again") == log(tmp_path / "out")[2:]
    ends = (numbers(tmp_path / name, UNet2DModel, "unet") for name in ("out", "again"))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_pretrained_pipeline_keeps_its_noise_schedule(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, scheduler = load("unconditional.py").UNet2DModel(CONFIG), DDPMScheduler()
    kept = scheduler.replace(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    parts = {"unet": unet, "scheduler": kept}
    DDPMPipeline(parts, {"unet": initial_params(unet.shapes(), 0)}).save_pretrained(tmp_path / "start")
    del options["model_config_name_or_path"]
    run(monkeypatch, "unconditional.py", **options, pretrained_model_name_or_path=tmp_path / "start", max_train_steps=2)
    assert DDPMPipeline.from_pretrained(tmp_path / "out").scheduler == kept
    before, after = (numbers(tmp_path / name, UNet2DModel, "unet") for name in ("start", "out"))
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_network_where_none_is_named() -> None:
    """That of diffusers' script: 113,673,219 parameters, attention in the fifth level only."""
    unet = UNet2DModel(load("unconditional.py").DEFAULT)
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(unet.shapes())) == 113_673_219


def test_another_resolution_than_the_networks_is_warned_of(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options |= {"model_config_name_or_path": network(tmp_path / "other", TWO_LEVELS.replace(sample_size=64))}
    with pytest.raises(ValueError), pytest.warns(UserWarning, match="--resolution 15 .*, 64 x 64 pixels"):
        run(monkeypatch, "unconditional.py", **options | {"resolution": 15})


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (CONFIG.replace(out_channels=6), {}, "in_channels=3 and out_channels=6"),
        (CONFIG.replace(num_class_embeds=10), {}, "needs class labels"),
        (TWO_LEVELS, {"resolution": 15}, "--resolution must be a multiple of 2 for this network, got 15"),
        (CONFIG, {"train_batch_size": 2}, "a training step takes 16 examples"),
        (CONFIG, {"train_data_dir": "nowhere"}, "nowhere: there is no such folder"),
        (CONFIG, {"ddpm_beta_schedule": "steep"}, "steep"),
        (CONFIG, {"ddpm_num_steps": 10, "timestep_bias_strategy": "range", "timestep_bias_begin": 20}, "timestep_bias"),
        (CONFIG, {"lr_scheduler": "piecewise_constant", "lr_step_rules": "x"}, "step_rules"),
        (CONFIG, {"resume_from_checkpoint": "checkpoint-9"}, "no checkpoint checkpoint-9"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_weights_are_drawn(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    config: UNet2DConfig, flags: dict[str, Any], message: str,
) -> None:  # fmt: skip
    wanted = options | {"model_config_name_or_path": network(tmp_path / "other", config)} | flags
    with pytest.raises((ValueError, OSError), match=message):
        run(monkeypatch, "unconditional.py", **wanted)
    assert "initialising" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"aspect_ratio_buckets": True}, "the pipeline generates squares"),
        ({"prediction_type": "flow"}, "invalid choice: 'flow'"),
        ({"center_crops": True}, "--center_crop"),
        ({"p_std": 1}, "--p_std is a flag of --objective edm; leave it out with ddpm"),
        ({"objective": "edm", "flow_shift": 3}, "--flow_shift is a flag of --objective flow_matching"),
        ({"objective": "edm", "snr_gamma": 5}, "--snr_gamma is a flag of --objective ddpm; leave it out with edm"),
        ({"objective": "flow_matching", "ddpm_num_steps": 100}, "--ddpm_num_steps is a flag of --objective ddpm"),
        ({"objective": "flow_matching", "mode_scale": 1}, "--mode_scale is a flag of --weighting_scheme mode"),
    ],
)
def test_wrong_flags_are_explained(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    wrong: dict[str, Any], message: str,
) -> None:  # fmt: skip
    with pytest.raises(SystemExit):
        run(monkeypatch, "unconditional.py", **options | wrong)
    assert message in capsys.readouterr().err
