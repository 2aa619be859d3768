"""``tpu/check.py``: all of it in its own process with a tiny model, and that it finds what is wrong."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax.training import flops
from tests.quick_xla import xla_flags
from tests.train.latent_models import save_sd
from tpu import check
from tpu.slices import GENERATIONS

ROOT = Path(__file__).resolve().parents[2]
SMALL = argparse.Namespace(matrix=16, megabytes=1, model="")


@pytest.mark.slow
def test_everything_in_its_own_process(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tpu" / "check.py"), "--matrix", "64", "--megabytes", "1", "--json"]
    command += ["--model", str(save_sd(tmp_path / "model"))]
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    environment = {**os.environ, "XLA_FLAGS": xla_flags(2), "JAX_COMPILATION_CACHE_DIR": cache}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    assert list(report["checks"]) == list(check.CHECKS)
    assert report["checks"]["devices"]["devices"] == report["checks"]["interconnect"]["devices"] == 2
    assert "peak of this device unknown" in report["checks"]["matmul"]["text"]
    assert report["checks"]["sample"]["compilations"] == [1, 0]
    assert report["checks"]["train"]["largest_change"] > 0


def test_the_quick_checks_pass_here() -> None:
    for one in (check.versions, check.devices, check.matmul, check.interconnect):
        result = one(SMALL)
        assert result.ok, result.text
        json.dumps(result.values)
    assert check.interconnect(SMALL).values["devices"] == jax.device_count()


def test_a_slow_device_and_a_slow_link_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "PEAK_FLOPS", (("cpu", 1e18),))
    result = check.matmul(SMALL)
    assert not result.ok
    assert "0% of 1000000 (slowest: device" in result.text
    assert result.values["peak"] == 1e18
    monkeypatch.setattr("tpu.slices.generation_of", lambda kind: SimpleNamespace(interconnect=1e18))
    assert not check.interconnect(SMALL).ok


def test_every_tpu_has_its_peaks() -> None:
    for generation in GENERATIONS:
        for kind in generation.device_kinds:
            assert flops.peak_flops(SimpleNamespace(device_kind=kind)) is not None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "lost", "said"),
    [((2, 4, 1), 0, "topology 2x4x1"), ((2, 4, 1), 1, "some of its chips are"), ((3, 1, 1), 0, "no slice of 3")],
)
def test_missing_chips_are_found(shape: Any, lost: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = lambda: {"bytes_limit": 16 << 30}
    chips = [
        SimpleNamespace(device_kind="TPU v5 lite", platform="tpu", coords=tuple(map(int, at)), memory_stats=stats)
        for at in np.ndindex(shape)
    ]
    monkeypatch.setattr(jax, "devices", lambda: chips[lost:])
    monkeypatch.setattr(jax, "local_devices", lambda: chips[lost:])
    result = check.devices(SMALL)
    assert said in result.text
    assert result.ok == (said == "topology 2x4x1")
    assert "16.0 GiB each" in result.text


def test_a_check_that_crashes_is_a_line_of_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(args: argparse.Namespace) -> check.Result:
        raise RuntimeError("no chip\nand more")

    monkeypatch.setattr(check, "CHECKS", {"broken": broken, "versions": check.versions})
    monkeypatch.setattr(sys, "argv", ["check.py"])
    assert check.main() == 1
    said = capsys.readouterr().out
    assert "FAIL  broken         RuntimeError: no chip  [" in said
    assert "pass  versions" in said
    assert said.endswith("1 of 2 checks failed: broken\n")
