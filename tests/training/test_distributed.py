"""Two processes with four devices each train what one process with eight does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(output: Path, process: int, processes: int, address: str, *flags: str) -> subprocess.Popen[str]:
    """One process of a run; its share of eight devices."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // processes} --xla_backend_optimization_level=0",
    }
    line = [sys.executable, str(ROOT / "tests" / "training" / "line.py"), "--output_dir", str(output), *flags]
    if processes > 1:
        line += ["--coordinator_address", address, "--num_processes", str(processes), "--process_id", str(process)]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment, cwd=output.parent)


def run(output: Path, processes: int, *flags: str) -> None:
    address = f"localhost:{free_port()}"
    started = [start(output, i, processes, address, *flags) for i in range(processes)]
    texts = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(texts)


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
    """Losses, parameters and what is exported into a checkpoint; then the checkpoint goes on with one process."""
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


def test_sigterm_of_one_process_stops_both_after_the_same_step(tmp_path: Path) -> None:
    address = f"localhost:{free_port()}"
    flags = ("--max_train_steps", "100000", "--pause", "0.05")
    both = [start(tmp_path / "run", i, 2, address, *flags) for i in range(2)]
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 90
    while not (log.is_file() and len(log.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in both), both[0].communicate()[0]
        time.sleep(0.1)
    both[1].send_signal(signal.SIGTERM)
    texts = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [143, 143], "\n".join(texts)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{losses(tmp_path / 'run')[-1][0]}"
    assert all(checkpoint.name in text for text in texts)
