"""Sampling with devices that belong to several processes, as on a TPU pod slice."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_sample_what_one_does(tmp_path: Path, processes: int) -> None:
    """Every process makes the same call and has all images at the end; parameters are sharded over them."""
    unet = UNet2DModel(TINY)
    params = initial_params(unet.shapes(), 0)
    DDIMPipeline({"unet": unet, "scheduler": DDIMScheduler()}, {"unet": params}).save_pretrained(tmp_path / "model")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    runs = [start(tmp_path / "model", tmp_path / "one.npy", 4)]
    devices, count = 4 // processes, str(processes)
    runs += [
        start(tmp_path / "model", tmp_path / "many.npy", devices, address, count, str(i)) for i in range(processes)
    ]
    texts = [run.communicate(timeout=60 * processes)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs), "\n".join(texts)
    one, many = np.load(tmp_path / "one.npy"), np.load(tmp_path / "many.npy")
    assert one.shape == (3, 8, 8, 3)
    np.testing.assert_allclose(many, one, atol=1e-5)
