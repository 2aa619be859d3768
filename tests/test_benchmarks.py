"""The end-to-end benchmark runs, and what it counts is what the library promises."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import common
from benchmarks.sampler_properties import USES
from tests.schedulers.samplers import EVERY
from tests.train.latent_models import save_sd

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_the_table_of_samplers_has_them_all() -> None:
    """A new sampler needs its line in ``benchmarks/sampler_properties.py``: its order and what it is good for."""
    assert sorted(f"{name}Scheduler" for name in USES) == sorted(EVERY)


def test_benchmarks_also_run_as_modules() -> None:
    """What a benchmark imports from beside it, it finds after saying where that is."""
    beside = {path.stem for path in BENCHMARKS.glob("*.py")}
    scripts = [path for path in BENCHMARKS.glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert len(scripts) >= 20
    for path in scripts:
        lines = path.read_text().splitlines()
        imports = [i for i, line in enumerate(lines) if line.strip().startswith("from ") and line.split()[1] in beside]
        said = [i for i, line in enumerate(lines) if "sys.path.insert(" in line]
        assert not imports or (said and said[0] < imports[0]), path.name


@pytest.mark.slow
def test_pipeline_tiny(tmp_path: Path) -> None:
    """Two steps of the tiny folder: nothing is compiled twice, and the next process compiles nothing at all."""
    options = ["--folders", "tiny", "--sides", "ours", "--steps", "2", "--repeats", "1", "--print-only"]
    command = [sys.executable, BENCHMARKS / "pipeline.py", *options, "--cache", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cold, cached, saved = (json.loads(line) for line in done.stdout.splitlines())
    assert not {"note"} & (cold.keys() | cached.keys() | saved.keys()), done.stderr
    assert cold["compilations"] >= 1
    assert cold["recompilations"] == 0
    assert cached["compilations"] == saved["compilations"] == 0, done.stderr
    assert cold["until_first_image"] >= cold["load"] + cold["first_image"] > 0
    assert (tmp_path / "tiny" / "model_index.json").exists()


@pytest.mark.slow
def test_memory_of_the_cascade_tiny() -> None:
    """Offloading leaves what a step reads; T5 counts only where it encodes."""
    command = [sys.executable, BENCHMARKS / "if_memory.py", "--size", "tiny", "--print-only", "--dtypes", "bfloat16"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    encode, *stages = (json.loads(line) for line in done.stdout.splitlines())
    assert [row["pixels"] for row in (encode, *stages)] == [None, 16, 64, 256]
    for row in (encode, *stages):
        assert row["all_offloaded"] == pytest.approx(row["parameters"] + row["temporary"])
        assert 0 < row["temporary"] < row["all_offloaded"] < row["all_on_device"]
    assert encode["T5_offloaded"] == encode["all_on_device"]
    assert all(row["all_on_device"] - row["T5_offloaded"] == pytest.approx(encode["parameters"]) for row in stages)


@pytest.mark.slow
def test_both_sides_of_image_tasks_make_the_same_images(tmp_path: Path) -> None:
    """Image to image, ControlNet and a live LoRA of the tiny folder, in both libraries."""
    pytest.importorskip("diffusers")
    options = ["--folder", "tiny", "--steps", "2", "--rounds", "1", "--print-only", "--cache", str(tmp_path)]
    command = [sys.executable, str(BENCHMARKS / "image_tasks.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [row["side"] for row in rows] == ["PyTorch diffusers", "diffuse_jax"] * 3
    assert max(row["difference"] for row in rows) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_steps_of_both_sides_are_the_same_work(method: str) -> None:
    """Small networks: the gradient of the first step is PyTorch's, so what is timed is comparable."""
    pytest.importorskip("diffusers")
    options = ["--model", "small", "--method", method, "--pixels", "32", "--rounds", "1", "--print-only"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "train_step.py", *options], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    theirs, ours = (json.loads(line) for line in done.stderr.splitlines() if line.startswith("{"))
    assert (theirs["side"], ours["side"]) == ("PyTorch", "diffuse_jax")
    assert ours["difference"] < 1e-3
    assert min(row["images_per_second"] for row in (theirs, ours)) > 0
    assert all(0 < row["peak_gib"] < 8 for row in (theirs, ours))


def test_every_trainer_has_a_step_to_time() -> None:
    """A new script of ``train/`` needs its row in ``benchmarks/trainer_steps.py``."""
    pytest.importorskip("diffusers")
    from benchmarks.trainer_steps import TRAINERS

    scripts = {path.stem for path in (BENCHMARKS.parent / "train").glob("*.py")}
    assert {name.partition(":")[0] for name in TRAINERS} == scripts


@pytest.mark.slow
def test_a_trainers_step_is_timed_on_both_sides(tmp_path: Path) -> None:
    """With tiny networks; the gradients of the first step agree."""
    pytest.importorskip("diffusers")
    options = ["--trainers", "textual_inversion", "--batch", "2", "--rounds", "1", "--print-only"]
    command = [sys.executable, BENCHMARKS / "train_step.py", *options, "--source", save_sd(tmp_path, fresh=False)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    theirs, ours = (json.loads(line) for line in done.stderr.splitlines() if line.startswith("{"))
    assert (theirs["side"], ours["side"]) == ("PyTorch", "diffuse_jax")
    assert ours["trained"] == "textual_inversion"
    assert ours["difference"] < 1e-3
    assert min(row["images_per_second"] for row in (theirs, ours)) > 0
    assert all(0 < row["step_gib"] < 1 for row in (theirs, ours))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the tpu extra)")
def test_a_training_step_compiles_for_a_tpu() -> None:
    options = ["--model", "small", "--pixels", "64", "--batch", "1", "--print-only"]
    done = subprocess.run([sys.executable, BENCHMARKS / "tpu_fit.py", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(next(line for line in done.stderr.splitlines() if line.startswith("{")))
    assert row["fits"]
    assert 0 < row["state"] < row["total"] < 1


def test_rows_are_added_to_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is interrupted keeps what it has; a table that is made anew is written at its end."""
    monkeypatch.setattr(common, "write", functools.partial(common.write, folder=tmp_path))
    old = [{"name": "a", "x": 1}, {"name": "b", "x": 2}]
    assert common.merged(old, [{"name": "c", "x": 3}, {"name": "a", "x": 4}], "name") == [
        {"name": "a", "x": 4}, {"name": "b", "x": 2}, {"name": "c", "x": 3}
    ]  # fmt: skip
    assert common.keys(old, "name", "x") == {("a", 1), ("b", 2)}

    def interrupted() -> Iterator[dict[str, Any]]:
        yield {"name": "c"}
        raise KeyboardInterrupt

    for before in ([], old):
        with pytest.raises(KeyboardInterrupt):
            common.extend("table", "Title", "About", before, interrupted())
        assert common.table("table", tmp_path) == ([*old, {"name": "c"}] if before else [])
