"""The training scripts from their command line, on a tiny pipeline and eight pictures."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from PIL import Image

from diffuse_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from diffuse_jax.models.unet_2d import UNet2DConfig, UNet2DModel
from diffuse_jax.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from diffuse_jax.pipelines import DDPMPipeline
from diffuse_jax.text.clip import CLIPTextModel
from diffuse_jax.training.initial import initial_params

ROOT = Path(__file__).resolve().parents[2]
VAE = AutoencoderKLConfig(
    block_out_channels=(4,),
    norm_num_groups=2,
    latent_channels=2,
    sample_size=8,
    mid_block_add_attention=False,
    scaling_factor=1.0,
)
UNET = UNet2DConditionConfig(
    sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",), layers_per_block=1, norm_num_groups=2, cross_attention_dim=128,
    num_attention_heads=1, mid_block_type=None,
)  # fmt: skip


PIXEL_UNET = UNet2DConfig(
    block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
    norm_num_groups=2, mid_block_type=None,
)  # fmt: skip


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "train" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(monkeypatch: pytest.MonkeyPatch, path: str, **flags: object) -> None:
    pairs = [(f"--{name}",) if value is True else (f"--{name}", str(value)) for name, value in flags.items()]
    monkeypatch.setattr(sys, "argv", [path, *itertools.chain(*pairs)])
    load(path).main()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight captioned pictures in ``data`` and a pipeline folder in ``model``."""
    folder = tmp_path_factory.mktemp("start")
    rng, make = np.random.default_rng(0), load("emoji/make_model.py")
    (folder / "data").mkdir()
    lines = []
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / "data" / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": [f"thing {i}", "thing"]})
    (folder / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = CLIPTextModel(make.text_config(520, 8).replace(num_hidden_layers=1, intermediate_size=16))
    parts = {"vae": AutoencoderKL(VAE), "unet": UNet2DConditionModel(UNET), "text_encoder": text}
    for name, model in parts.items():
        model.save_pretrained(folder / "model" / name, initial_params(model.shapes(), 0))
    for path, data in (("scheduler/scheduler_config.json", make.SCHEDULER), ("model_index.json", make.MODEL_INDEX)):
        (folder / "model" / path).parent.mkdir(exist_ok=True)
        (folder / "model" / path).write_text(json.dumps(data))
    tokenizer = load("emoji/make_tokenizer.py")
    texts = [text for line in lines for text in line["text"]]
    tokenizer.write_tokenizer(folder / "model" / "tokenizer", tokenizer.learn_merges(texts, 6), 8)
    return folder


def flags(start: Path, output: Path, **more: object) -> dict[str, object]:
    shared = {
        "pretrained_model_name_or_path": start / "model",
        "train_data_dir": start / "data",
        "output_dir": output,
        "resolution": 8,
        "train_batch_size": 1,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 1,
        "logging_steps": 1,
    }
    return shared | more


def numbers(folder: Path, kind: type, part: str) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(kind.from_pretrained(folder, subfolder=part)[1])]


def test_vae(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "vae.py", **flags(start, tmp_path, max_train_steps=4, crop_size=4, use_ema=True))
    vae, params = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    images = np.stack([np.asarray(Image.open(start / "data" / f"{i}.png")) for i in range(8)]) / np.float32(127.5) - 1
    latents = vae.apply({"params": params}, images, method="encode").mean * vae.config.scaling_factor
    assert float(latents.std()) == pytest.approx(1.0, rel=1e-3)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 4


def test_unconditional_learns_eight_pictures(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    UNet2DModel(PIXEL_UNET).save_pretrained(tmp_path / "net", initial_params(UNet2DModel(PIXEL_UNET).shapes(), 0))
    options = {"model_config_name_or_path": tmp_path / "net", "max_train_steps": 60, "use_ema": True, "snr_gamma": 5,
               "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "learning_rate": 3e-3,
               "checkpointing_steps": 50}  # fmt: skip
    shared = {k: v for k, v in flags(start, tmp_path / "out").items() if k not in ("pretrained_model_name_or_path")}
    run(monkeypatch, "unconditional.py", **shared | options)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-10:]) < 0.5 * losses[0]
    pipe = DDPMPipeline.from_pretrained(tmp_path / "out")
    images = pipe(2, num_inference_steps=5, seed=0, output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    assert np.isfinite(images).all()
    assert DDPMPipeline.from_pretrained(tmp_path / "out" / "checkpoint-50").scheduler == pipe.scheduler


def test_text_to_image_resumes_bit_for_bit(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"train_text_encoder": True, "cache_latents": True, "use_ema": True, "snr_gamma": 5,
               "proportion_empty_prompts": 0.5, "lr_scheduler": "constant", "checkpointing_steps": 2}  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(monkeypatch, "text_to_image.py", **flags(start, whole, max_train_steps=3, **options))
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    resumed = options | {"resume_from_checkpoint": "latest"}
    run(monkeypatch, "text_to_image.py", **flags(start, parts, max_train_steps=3, **resumed))
    for kind, part in ((UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder")):
        end, again, before = (numbers(folder, kind, part) for folder in (whole, parts, start / "model"))
        for a, b in zip(end, again, strict=True):
            np.testing.assert_array_equal(a, b)
        assert any(not np.array_equal(a, b) for a, b in zip(end, before, strict=True))
    assert json.loads((whole / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"


def test_frozen_parts_stay_and_the_prediction_type_is_saved(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = flags(start, tmp_path, max_train_steps=2, prediction_type="epsilon", mixed_precision="bf16")
    run(monkeypatch, "text_to_image.py", **options)
    for kind, part in ((AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder")):
        for a, b in zip(numbers(tmp_path, kind, part), numbers(start / "model", kind, part), strict=True):
            np.testing.assert_array_equal(a, b)
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    ("path", "wrong", "message"),
    [
        ("vae.py", {"crop_size": 16}, "larger than --resolution"),
        ("text_to_image.py", {"proportion_empty_prompts": 1.5}, "between 0 and 1"),
        ("text_to_image.py", {"cache_latents": True, "random_flip": True}, "leave out --random_flip"),
        ("text_to_image.py", {"mixed_precision": "fp16"}, "invalid choice"),
    ],
)
def test_wrong_flags_are_explained(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    path: str, wrong: dict[str, object], message: str,
) -> None:  # fmt: skip
    with pytest.raises(SystemExit):
        run(monkeypatch, path, **flags(start, tmp_path, **wrong))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", ["vae.py", "text_to_image.py", "unconditional.py", "emoji/make_dataset.py", "emoji/export.py"]
)
def test_help_has_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str) -> None:
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    monkeypatch.syspath_prepend(str(ROOT / "train" / "emoji"))
    with pytest.raises(SystemExit):
        load(path).main()
    assert f"python train/{path} --" in capsys.readouterr().out
