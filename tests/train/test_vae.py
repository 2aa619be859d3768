"""``train/vae.py`` from its command line, on twelve emoji."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from diffuse_jax.models import AutoencoderKL
from diffuse_jax.models.autoencoder_kl import AutoencoderKLConfig
from diffuse_jax.training.data import data_from
from diffuse_jax.training.initial import initial_params
from diffuse_jax.training.pixels import first_images
from tests.train.helpers import EMOJI, load, log, numbers, run
from tests.training.test_perceptual import vgg16_state

CONFIG = AutoencoderKLConfig(
    block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4, latent_channels=4, sample_size=32, mid_block_add_attention=False,
)  # fmt: skip


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Flags of a small training: a new network on 32 pixels, one image per device."""
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text(json.dumps(AutoencoderKL(CONFIG).config_json()))
    return {
        "model_config_name_or_path": tmp_path / "net",
        "train_data_dir": EMOJI,
        "output_dir": tmp_path / "out",
        "resolution": 32,
        "train_batch_size": 1,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "report_to": "none",
    }


def test_images_are_learned_and_latents_measured(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"max_train_steps": 40, "train_batch_size": 8, "crop_size": 16, "checkpointing_steps": 30, "use_ema": True}
    run(monkeypatch, "vae.py", devices=1, **options | more)
    assert np.mean(log(tmp_path / "out")[-8:]) < 0.4 * log(tmp_path / "out")[0]

    vae, params = AutoencoderKL.from_pretrained(tmp_path / "out", subfolder="vae")
    images = np.stack(list(first_images(data_from(load_args(options, monkeypatch)), 12)))
    latents = vae.apply({"params": params}, images / np.float32(127.5) - 1, method="encode").mean
    assert float(latents.std()) * vae.config.scaling_factor == pytest.approx(1.0, rel=1e-3)
    assert vae.config.sample_size == 32
    AutoencoderKL.from_pretrained(tmp_path / "out" / "checkpoint-30", subfolder="vae")
    with Image.open(next((tmp_path / "out" / "validation" / "step-40").glob("*.png"))) as shown:
        assert shown.size == (4 * 32, 2 * 32), "four images above their reconstructions"
        np.testing.assert_array_equal(np.asarray(shown)[:32, :32], images[0])


def test_a_decoder_is_trained_further_for_the_same_latents(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del options["model_config_name_or_path"]
    start = AutoencoderKL(CONFIG.replace(scaling_factor=0.7))
    start.save_pretrained(tmp_path / "start", before := initial_params(start.shapes(), 0))
    wanted = {"pretrained_model_name_or_path": tmp_path / "start", "train_decoder_only": True, "max_train_steps": 2}
    run(monkeypatch, "vae.py", devices=1, **options | wanted, num_validation_images=1)
    vae, after = AutoencoderKL.from_pretrained(tmp_path / "out", subfolder="vae")
    assert vae.config.scaling_factor == 0.7, "networks were trained on latents of this scale"
    for name in before:
        same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before[name], after[name])), strict=True)]
        assert not any(same) if name in ("decoder", "post_quant_conv") else all(same), name


def load_args(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["vae.py", *words])
    return load("vae.py").parse_args()


@pytest.fixture
def judged(options: dict[str, Any], tmp_path: Path, rng: np.random.Generator) -> dict[str, Any]:
    """The same with every term: a frozen network of random weights, and a discriminator."""
    path = tmp_path / "vgg16.safetensors"
    from safetensors.numpy import save_file

    save_file(vgg16_state(rng), path)
    terms = {"perceptual_weight": 0.1, "perceptual_model_path": path, "discriminator_weight": 0.5}
    sizes = {"discriminator_layers": 1, "discriminator_channels": 16, "num_validation_images": 0}
    return options | terms | sizes


def test_every_term_on_a_mesh_in_bfloat16(
    judged: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"discriminator_start": 2, "max_train_steps": 4, "mesh_fsdp": 2, "mixed_precision": "bf16"}
    run(monkeypatch, "vae.py", **judged, **wanted, gradient_checkpointing=True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    names = {"pixels", "edges", "perceptual", "kl", "adversarial", "discriminator", "balance"}
    assert names <= set(lines[0])
    rest = [line["pixels"] + line["edges"] + 0.1 * line["perceptual"] + 1e-4 * line["kl"] for line in lines]
    for line, value in zip(lines[:2], rest, strict=False):
        assert line["loss"] == pytest.approx(value, rel=1e-4), "before its start the discriminator is not heard"
    for line, value in zip(lines[2:], rest[2:], strict=True):
        heard = value + 0.5 * line["balance"] * line["adversarial"] + line["discriminator"]
        assert line["loss"] == pytest.approx(heard, rel=1e-4)
    assert {array.dtype for array in numbers(tmp_path / "out", AutoencoderKL, "vae")} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(
    judged: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both networks that are trained; the perceptual loss has no state."""
    kept = {name: value for name, value in judged.items() if not name.startswith("perceptual")}
    wanted = kept | {"max_train_steps": 4, "checkpointing_steps": 2, "discriminator_start": 3, "crop_size": 16}
    run(monkeypatch, "vae.py", devices=1, **wanted)
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    run(
        monkeypatch,
        "vae.py",
        devices=1,
        **wanted | {"output_dir": tmp_path / "again", "resume_from_checkpoint": "latest"},
    )
    assert log(tmp_path / "again") == log(tmp_path / "out")[2:]
    ends = (numbers(tmp_path / name, AutoencoderKL, "vae") for name in ("out", "again"))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop_size": 64}, "--crop_size must be from 1 to --resolution 32, got 64"),
        ({"crop_size": 16, "aspect_ratio_buckets": True}, "leave out one of them"),
        ({"perceptual_weight": 1}, "belong together"),
        ({"train_decoder_only": True}, "give --pretrained_model_name_or_path"),
    ],
)
def test_wrong_flags_are_explained(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    wrong: dict[str, Any], message: str,
) -> None:  # fmt: skip
    with pytest.raises(SystemExit):
        run(monkeypatch, "vae.py", **options, **wrong)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop_size": 15}, "--crop_size must be a multiple of 2 for this autoencoder, got 15"),
        ({"discriminator_weight": 1, "crop_size": 16}, "at least 24 pixels, --crop_size is 16"),
        ({"pretrained_model_name_or_path": "diffuse-jax/emoji"}, "leave out --model_config_name_or_path"),
        ({"train_data_dir": "nowhere"}, "nowhere: there is no such folder"),
        ({"train_batch_size": 99}, "use a smaller batch"),
        ({"validation_image": "nowhere.png"}, "nowhere.png"),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "x"}, "step_rules"),
        ({"resume_from_checkpoint": "checkpoint-9"}, "no checkpoint checkpoint-9"),
        ({"perceptual_weight": 1, "perceptual_model_path": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read_or_drawn(
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    wrong: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        run(monkeypatch, "vae.py", **options | wrong)
    assert "AutoencoderKL" not in capsys.readouterr().err
    assert not Path(options["output_dir"]).exists()
