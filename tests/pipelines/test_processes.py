"""Sampling with devices that belong to several processes, as on a TPU pod slice."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from diffuse_jax import DDIMPipeline, DDIMScheduler
from diffuse_jax.models.unet_2d import UNet2DConfig, UNet2DModel
from diffuse_jax.training.initial import initial_params
from tests.quick_xla import xla_flags

ROOT = Path(__file__).resolve().parents[2]
TINY = UNet2DConfig(
    block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
    norm_num_groups=2, mid_block_type=None, sample_size=8,
)  # fmt: skip


def start(model: Path, output: Path, devices: int, *distributed: str) -> subprocess.Popen[str]:
    line = [sys.executable, str(ROOT / "tests/pipelines/sample.py"), str(model), str(output), *distributed]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(devices)}
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_two_processes_draw_the_same_noise_as_one(tmp_path: Path) -> None:
    """Every process makes the same call and has all images at the end; parameters are sharded over both."""
    unet = UNet2DModel(TINY)
    params = initial_params(unet.shapes(), 0)
    DDIMPipeline({"unet": unet, "scheduler": DDIMScheduler()}, {"unet": params}).save_pretrained(tmp_path / "model")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    runs = [start(tmp_path / "model", tmp_path / "one.npy", 4)]
    runs += [start(tmp_path / "model", tmp_path / "two.npy", 2, address, "2", str(i)) for i in range(2)]
    texts = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], "\n".join(texts)
    one, two = np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy")
    assert one.shape == (3, 8, 8, 3)
    np.testing.assert_allclose(two, one, atol=1e-5)
