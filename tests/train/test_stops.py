"""SIGTERM at any moment of a script's life: a checkpoint of the last finished step or a message that there is none."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from diffuse_jax.models import UNet2DModel
from diffuse_jax.models.unet_2d import UNet2DConfig
from diffuse_jax.training.checkpoint import checkpoints
from tests.quick_xla import xla_flags
from tests.train.helpers import EMOJI, ROOT, log

STEPS, MOMENTS = 12, 30
CONFIG = UNet2DConfig(
    block_out_channels=(16, 16), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    layers_per_block=1, norm_num_groups=4, add_attention=False,
)  # fmt: skip


class Ended(NamedTuple):
    """A process that has ended: its exit status, its stderr, and the seconds since the two marks below."""

    code: int
    said: str
    seconds: dict[str, float]


MARKS = {"loading": "loading JAX and the library", "training": "step 1 is done"}
"""Moments of a run -> the message."""


def train(tmp_path: Path, output: Path, mark: str = "", after: float = 0.0, **flags: Any) -> Ended:
    """One process that trains; sent SIGTERM so many seconds after a mark, where one is named."""
    options = {
        "model_config_name_or_path": tmp_path / "net", "train_data_dir": EMOJI, "output_dir": output, "resolution": 16,
        "train_batch_size": 2, "max_train_steps": STEPS, "checkpointing_steps": 5, "validation_steps": 4,
        "eval_batch_size": 1, "ddpm_num_inference_steps": 2, "logging_steps": 1, "lr_warmup_steps": 1,
        "learning_rate": 1e-2, "report_to": "none", "ccache": tmp_path / "programs", **flags,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(), "JAX_PLATFORMS": "cpu"}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "train" / "unconditional.py"), *words],
        env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert run.stderr is not None
    passed, said, timer = {}, "", threading.Timer(after, run.send_signal, (signal.SIGTERM,))
    for line in run.stderr:
        said += line
        for name, text in MARKS.items():
            if text in line and name not in passed:
                passed[name] = time.monotonic()
                if name == mark:
                    timer.start()
    code, end = run.wait(120), time.monotonic()
    timer.cancel()
    return Ended(code, said, {name: end - start for name, start in passed.items()})


def result(output: Path) -> bytes:
    return (output / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def check_stopped(output: Path, ended: Ended) -> str:
    """A stopped run reports its outcome truthfully; returns the outcome in one word."""
    assert "Traceback" not in ended.said, ended.said
    if ended.code in (0, -signal.SIGTERM):  # over before the signal came, or while Python itself was ending
        assert result(output)
        return "complete"
    assert ended.code == 128 + signal.SIGTERM, ended.said
    assert "SIGTERM received: " in ended.said
    if "the run is complete" in ended.said:
        assert result(output)
        return "complete"
    if saved := re.search(r"checkpoint-(\d+) is written", ended.said):
        assert max(checkpoints(output)) == int(saved[1]) == log(output, "step")[-1]
        return f"saved {saved[1]}"
    assert "no step was finished, so there is nothing to save" in ended.said, ended.said
    assert not checkpoints(output)
    assert not (output / "log.jsonl").is_file() or not log(output)
    return "nothing"


@pytest.mark.slow
def test_a_run_that_is_stopped_at_any_moment_resumes_to_the_same_bits(tmp_path: Path) -> None:
    seed = int(os.environ.get("DIFFUSE_JAX_TEST_SEED") or random.randrange(10**6))
    print(f"moments of the signal: seed {seed} (DIFFUSE_JAX_TEST_SEED)")
    draw = random.Random(seed)
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text(json.dumps(UNet2DModel(CONFIG).config_json()))
    train(tmp_path, tmp_path / "first")  # compiles
    quiet = train(tmp_path, tmp_path / "quiet")
    assert quiet.code == 0, quiet.said
    seen = []
    for n in range(MOMENTS):
        output, mark = tmp_path / f"run-{n}", ("loading", "training", "training")[n % 3]
        moment = draw.uniform(0, quiet.seconds[mark])
        seen.append(check_stopped(output, train(tmp_path, output, mark, moment)))
        print(f"{moment:.2f} of {quiet.seconds[mark]:.2f} s after the start of {mark}: {seen[-1]}")
        if seen[-1] != "complete":
            again = train(tmp_path, output, resume_from_checkpoint="latest")
            assert again.code == 0, again.said
        assert result(output) == result(tmp_path / "quiet")
        assert log(output) == log(tmp_path / "quiet")
    assert len({word.split()[0] for word in seen}) > 1, "moments of more than one kind"
