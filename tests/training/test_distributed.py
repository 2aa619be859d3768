"""Two processes with four devices each train what one process with eight does."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from diffuse_jax.models.unet_2d import UNet2DConfig, UNet2DModel
from diffuse_jax.training.initial import initial_params
from tests.quick_xla import xla_flags
from tests.train.latent_models import save_sd

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


LINE = "tests/training/line.py"


def start(
    output: Path, process: int, processes: int, address: str, *flags: str, script: str = LINE, devices: int = 8
) -> subprocess.Popen[str]:
    """One process of a run; its share of the devices."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(devices // processes)}
    line = [sys.executable, str(ROOT / script), "--output_dir", str(output), *flags]
    if processes > 1:
        line += ["--coordinator_address", address, "--num_processes", str(processes), "--process_id", str(process)]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment, cwd=output.parent)


def run(output: Path, processes: int, *flags: str, timeout: float = 120, **options: Any) -> None:
    address = f"localhost:{free_port()}"
    started = [start(output, i, processes, address, *flags, **options) for i in range(processes)]
    texts = [process.communicate(timeout=timeout)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(texts)


def wait_for_steps(folder: Path, steps: int, processes: list[subprocess.Popen[str]]) -> None:
    """Wait until so many steps are in the log of a run."""
    log, deadline = folder / "log.jsonl", time.monotonic() + 180
    while not (log.is_file() and len(log.read_text().splitlines()) >= steps):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.1)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines())]


def params(folder: Path) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "line" / "params.npz"))


MESHES = {
    "all": ("--mesh_fsdp", "4", "--gradient_accumulation_steps", "2"),
    "data": (),
    "fsdp": ("--mesh_data", "1", "--mesh_fsdp", "8"),
    "tensor": ("--mesh_data", "1", "--mesh_tensor", "8"),
}


@pytest.mark.parametrize("mesh", ["all", *(pytest.param(n, marks=pytest.mark.slow) for n in MESHES if n != "all")])
def test_two_processes_train_as_one(tmp_path: Path, mesh: str) -> None:
    """Losses, parameters and the export in a checkpoint; then one process resumes from the checkpoint."""
    flags = ("--max_train_steps", "6", "--checkpointing_steps", "4", "--use_ema", *MESHES[mesh])
    run(tmp_path / "one", 1, *flags)
    run(tmp_path / "two", 2, *flags)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [step for step, _ in two] == [1, 2, 3, 4, 5, 6], "only one process writes the log"
    np.testing.assert_allclose(one, two, rtol=1e-6)
    for folder in ("", "checkpoint-4"):
        a, b = params(tmp_path / "one" / folder), params(tmp_path / "two" / folder)
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-6, atol=1e-7)
    assert {p.name for p in (tmp_path / "two" / "checkpoint-4").glob("data-*")} == {"data-0.json", "data-1.json"}
    before = params(tmp_path / "two")
    run(tmp_path / "two", 1, *flags, "--resume_from_checkpoint", "checkpoint-4")
    for name, value in params(tmp_path / "two").items():
        np.testing.assert_allclose(value, before[name], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_four_processes_train_as_one_and_two_continue(tmp_path: Path) -> None:
    flags = ("--max_train_steps", "6", "--checkpointing_steps", "4", "--mesh", "data=4,fsdp=2")
    run(tmp_path / "one", 1, *flags)
    run(tmp_path / "four", 4, *flags, timeout=600)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "four"), rtol=1e-6)
    before = params(tmp_path / "four")
    assert {p.name for p in (tmp_path / "four" / "checkpoint-4").glob("data-*")} == {f"data-{i}.json" for i in range(4)}
    run(tmp_path / "four", 2, *flags, "--resume_from_checkpoint", "checkpoint-4", timeout=600)
    for name, value in params(tmp_path / "four").items():
        np.testing.assert_allclose(value, before[name], rtol=1e-6, atol=1e-7)


def test_an_error_on_one_process_ends_the_other_with_its_reason(tmp_path: Path) -> None:
    address, flags = f"localhost:{free_port()}", ("--max_train_steps", "9", "--fails", "1")
    both = [start(tmp_path / "run", i, 2, address, *flags) for i in range(2)]
    texts = [process.communicate(timeout=120)[0] for process in both]
    assert "line.py: the disk is gone" in texts[1]
    assert re.search("process 1 of 2 on .* failed: the disk is gone; .*--resume_from_checkpoint latest", texts[0])
    assert [process.returncode for process in both] == [1, 1], "\n".join(texts)


@pytest.mark.slow
def test_a_process_that_dies_ends_all_within_a_minute_and_fewer_continue(tmp_path: Path) -> None:
    """Four processes, one killed; the others name it, and two continue from the last checkpoint."""
    address, folder = f"localhost:{free_port()}", tmp_path / "run"
    flags = ("--max_train_steps", "100000", "--pause", "0.05", "--checkpointing_steps", "5")
    all_four = [start(folder, i, 4, address, *flags) for i in range(4)]
    wait_for_steps(folder, 12, all_four)
    all_four[2].kill()
    killed = time.monotonic()
    texts = [process.communicate(timeout=120)[0] for process in all_four]
    assert time.monotonic() - killed < 60, "\n".join(texts)
    for i in (0, 1, 3):
        assert re.search("process 2 of 4 on .* has not been heard of for 25 s", texts[i]), texts[i]
        assert all_four[i].returncode == 1
    done = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    assert done >= 5
    flags = ("--max_train_steps", str(done + 2), "--resume_from_checkpoint", "latest")
    run(folder, 2, *flags, timeout=600)
    assert losses(folder)[-1][0] == done + 2


def test_sigterm_of_one_process_stops_both_after_the_same_step(tmp_path: Path) -> None:
    address = f"localhost:{free_port()}"
    flags = ("--max_train_steps", "100000", "--pause", "0.05")
    both = [start(tmp_path / "run", i, 2, address, *flags) for i in range(2)]
    wait_for_steps(tmp_path / "run", 4, both)
    both[1].send_signal(signal.SIGTERM)
    texts = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [143, 143], "\n".join(texts)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{losses(tmp_path / 'run')[-1][0]}"
    assert all(checkpoint.name in text for text in texts)


PIXELS = UNet2DConfig(
    block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
    norm_num_groups=2, mid_block_type=None,
)  # fmt: skip


def write_images(folder: Path) -> None:
    """Eight captioned images."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"a red thing {i}"}) for i in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


PROMPT = ("--validation_prompt", "a red apple", "--num_validation_images", "2", "--validation_inference_steps", "3")
MORE = {
    "text_to_image_lora.py": PROMPT,
    "textual_inversion.py": (
        *("--placeholder_token", "<new>", "--initializer_token", "noto", "--save_as_full_pipeline"),
        *("--validation_prompt", "a <new> apple", "--validation_inference_steps", "3"),
    ),
    "vae.py": ("--num_validation_images", "2"),
}
"""What each script wants besides."""


def check_files(one: Path, two: Path) -> None:
    """Both runs wrote the same files of tensors, in their second checkpoint too, and the tensors agree."""
    files = {p.relative_to(one) for p in one.rglob("*.safetensors")}
    assert files == {p.relative_to(two) for p in two.rglob("*.safetensors")}
    assert any("checkpoint-2" in str(file) for file in files)
    for file in files:
        a, b = (load_file(folder / file) for folder in (one, two))
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-5, err_msg=f"{file} {key}")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["unconditional.py", "text_to_image_lora.py", "textual_inversion.py", "vae.py"])
def test_a_trainer_gives_the_same_model_with_two_processes(tmp_path: Path, script: str) -> None:
    """One device each: losses, every tensor that is written, the checkpoint's copies too, and validation images."""
    write_images(tmp_path / "data")
    flags = ["--train_data_dir", str(tmp_path / "data"), "--train_batch_size", "2", "--max_train_steps", "3"]
    flags += ["--logging_steps", "1", "--checkpointing_steps", "2", "--report_to", "none", "--mesh_fsdp", "2"]
    flags += ["--lr_warmup_steps", "0", "--lr_scheduler", "constant"]
    if script == "unconditional.py":
        model = UNet2DModel(PIXELS)
        model.save_pretrained(tmp_path / "net", initial_params(model.shapes(), 0))
        flags += ["--model_config_name_or_path", str(tmp_path / "net"), "--resolution", "8"]
        flags += ["--use_ema", "--eval_batch_size", "2", "--ddpm_num_inference_steps", "3"]
    else:
        flags += ["--pretrained_model_name_or_path", "diffuse-jax/emoji", "--resolution", "64", "--center_crop"]
        flags += MORE[script]
    for processes, name in ((1, "one"), (2, "two")):
        run(tmp_path / name, processes, *flags, script=f"train/{script}", devices=2, timeout=900)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5)
    check_files(tmp_path / "one", tmp_path / "two")
    shown = {p.relative_to(tmp_path / "one") for p in (tmp_path / "one" / "validation").rglob("*.png")}
    assert shown
    for file in shown:
        a, b = (np.asarray(Image.open(tmp_path / name / file), np.int16) for name in ("one", "two"))
        assert np.abs(a - b).max() <= 1, file


REWARD = """
def redness(images, prompts):
    return (images[..., 0] ** 2 - images[..., 1] * images[..., 2]).mean((1, 2))
"""
LORA = "pytorch_lora_weights.safetensors"


def check_rewards(one: Path, two: Path, steps: int) -> None:
    """Both logs have the same rewards, of so many steps."""
    logs = [[json.loads(line) for line in (p / "log.jsonl").read_text().splitlines()] for p in (one, two)]
    a, b = ([(row["step"], row["reward_mean"], row["reward_std"]) for row in rows] for rows in logs)
    assert [row[0] for row in b] == [*range(1, steps + 1)]
    np.testing.assert_allclose(a, b, rtol=1e-5)


REWARDED = {
    "draft": ("--train_batch_size", "4", "--gradient_steps", "2"),
    "ddpo": ("--train_batch_size", "2", "--sample_batch_size", "4", "--sample_num_batches_per_epoch", "1",
             "--per_prompt_stat_tracking", "--per_prompt_stat_tracking_min_count", "2"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", REWARDED)
def test_two_processes_tune_to_a_reward_as_one(tmp_path: Path, method: str) -> None:
    """One device each: rewards, every tensor that is written, the checkpoint's copies too, and its continuation."""
    save_sd(tmp_path / "model", fresh=False)
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\n", encoding="utf-8")
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    flags = ["--pretrained_model_name_or_path", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.txt")]
    flags += ["--reward", f"{tmp_path / 'mine.py'}:redness", "--sample_num_steps", "3", "--report_to", "none"]
    flags += ["--max_train_steps", "4", "--checkpointing_steps", "2", "--learning_rate", "1e-2"]
    flags += ["--method", method, *REWARDED[method]]
    for processes, name in ((1, "one"), (2, "two")):
        run(tmp_path / name, processes, *flags, script="train/reward.py", devices=2, timeout=600)
    check_rewards(tmp_path / "one", tmp_path / "two", steps=4)
    check_files(tmp_path / "one", tmp_path / "two")
    before = load_file(tmp_path / "two" / LORA)
    more = (*flags, "--resume_from_checkpoint", "checkpoint-2")
    run(tmp_path / "two", 1, *more, script="train/reward.py", devices=2, timeout=600)
    for key, value in load_file(tmp_path / "two" / LORA).items():
        np.testing.assert_allclose(value, before[key], rtol=1e-4, atol=1e-5, err_msg=key)
