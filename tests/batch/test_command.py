"""``diffuse-jax generate --prompts-file``: its flags, its exit status and what a signal does."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import diffuse_jax
from diffuse_jax import cli
from diffuse_jax.batch import job
from tests.batch.stub import Stub
from tests.quick_xla import xla_flags

ROOT = Path(__file__).resolve().parents[2]


class FakePipeline:
    """A pipeline that only says what its sampler is."""

    scheduler = SimpleNamespace()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pipeline was opened with; the images come from ``stub``."""
    found: dict[str, Any] = {"stub": Stub()}

    def open_it(source: str, **options: Any) -> FakePipeline:
        found.update(options, source=source)
        return FakePipeline()

    def device(pipe: Any, batch_size: Any) -> Stub:
        found["batch_size"] = batch_size
        return found["stub"]

    monkeypatch.setitem(vars(diffuse_jax), "DiffusionPipeline", SimpleNamespace(from_pretrained=open_it))
    monkeypatch.setattr(job, "Device", device)
    return found


def run(*words: object) -> int:
    return cli.main(["generate", *(str(word) for word in words)])


def written(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in output.glob("*/metadata.jsonl") for line in path.open(encoding="utf-8")]


def prompts(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.txt"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_flags_are_the_settings_of_rows_without_their_own(opened: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a cat"}\n{"prompt": "a dog", "height": 16, "id": 3}\n')
    flags = ["--height", 8, "--seed", 100, "--negative-prompt", "blurry", "--num-inference-steps", 4, "--keep", "id"]
    assert run("--prompts-file", path, "--output", tmp_path / "out", *flags) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'out'}\n"
    assert "2 images made" in err
    names = ("seed", "height", "num_inference_steps", "negative_prompt", "id")
    first, second = sorted(written(tmp_path / "out"), key=lambda one: one["line"])
    assert [first.get(name) for name in names] == [101, 8, 4, "blurry", None]
    assert [second.get(name) for name in names] == [102, 16, 4, "blurry", 3]
    assert first["model"] == "diffuse-jax/emoji"
    assert opened["batch_size"] == "auto"
    assert dict(opened["mesh"].shape)["data"] == 8, "images are divided over all devices"


def test_what_fails_makes_the_status_1_and_nothing_is_lost(opened: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    path = prompts(tmp_path, "a cat", "refused", "a dog")
    assert run("--prompts-file", path, "--output", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "row 2, seed 2: the prompt is refused\n" in err
    assert re.search(r"^diffuse-jax generate: 1 rows or images failed, see .*failures.jsonl", err, re.MULTILINE)
    assert len(written(tmp_path / "out")) == 2
    prompts(tmp_path, "a cat", "allowed", "a dog")
    assert run("--prompts-file", path, "--output", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "failures.jsonl").exists()
    assert sorted(one["line"] for one in written(tmp_path / "out")) == [1, 2, 3]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_after_the_images_under_way(
    opened: dict[str, Any], tmp_path: Path, capsys: Any, number: int, status: int
) -> None:
    class Signalled(Stub):
        def batch(self, images: Any) -> Any:
            if len(self.batches) == 2:
                os.kill(os.getpid(), number)
            return super().batch(images)

    opened["stub"] = Signalled()
    path = prompts(tmp_path, *map(str, range(40)))
    line = ("--prompts-file", path, "--output", tmp_path / "out")
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        run(*line)
    assert stop.value.code == status
    assert signal.getsignal(number) is handler
    err = capsys.readouterr().err
    assert f"{signal.Signals(number).name}: finishing the images that are under way" in err
    assert "to continue, run the same command again" in err
    before = len(written(tmp_path / "out"))
    assert 8 <= before < 40
    opened["stub"] = Stub()
    assert run(*line) == 0
    assert f"{40 - before} images made" in capsys.readouterr().err
    assert sorted(one["line"] for one in written(tmp_path / "out")) == [*range(1, 41)]


def test_a_dry_run_counts(opened: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    path = prompts(tmp_path, "a", "b", "c")
    line = ("--prompts-file", path, "--output", tmp_path / "out")
    assert run(*line, "--dry-run", "--num-images-per-prompt", 2) == 0
    assert capsys.readouterr().out == "6 images, 0 there, 6 to make\n"
    assert not written(tmp_path / "out")
    assert run(*line) == 0, "nothing is decided before there are images"


def test_other_settings_are_noticed(opened: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    line = ("--prompts-file", prompts(tmp_path, "a", "b"), "--output", tmp_path / "out")
    assert run(*line, "--guidance-scale", 5) == 0
    assert run(*line, "--guidance-scale", 7) == 1
    assert "has images with guidance_scale 5.0, not 7.0; continue with the same settings" in capsys.readouterr().err
    assert run(*line, "--guidance-scale", 5, "--image-format", "webp") == 1
    assert "image_format 'png', not 'webp'" in capsys.readouterr().err
    assert run(*line, "--guidance-scale", 5, "--dtype", "bfloat16") == 1
    assert "has images with dtype None, not 'bfloat16'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (lambda p: ("--prompt", "a", "--layout", "webdataset"), "--layout: only with --prompts-file"),
        (lambda p: ("--prompt", "a", "--batch-size", "auto"), "--batch-size auto: only with --prompts-file"),
        (lambda p: ("--prompts-file", p, "--progress-bar"), "--progress-bar: not with --prompts-file"),
        (lambda p: ("--prompts-file", p, "--seed", 1, 2), "--seed takes one value with --prompts-file"),
        (lambda p: ("--prompts-file", p, "--process-id", 1), "give --num-processes and --process-id together"),
        (lambda p: ("--prompts-file", p, "--quality", 200), "--quality must be from 1 to 100, got 200"),
        (
            lambda p: ("--prompts-file", p, "--process-id", 2, "--num-processes", 2),
            "must be less than --num-processes 2",
        ),
        (lambda p: ("--prompts-file", p.with_name("none.txt")), "none.txt"),
        (lambda p: ("--prompts-file", p, "--keep", "height"), "keep names 'height', which is stored"),
        (lambda p: ("--prompts-file", p, "--keep", "file_name"), "keep names 'file_name', which is stored"),
        (lambda p: ("--prompts-file", p, "--keep", "model"), "keep names 'model', which is stored"),
    ],
)
def test_flags_that_do_not_go_together(
    opened: dict[str, Any], tmp_path: Path, capsys: Any, words: Callable[[Path], tuple[object, ...]], error: str
) -> None:
    assert run(*words(prompts(tmp_path, "a")), "--output", tmp_path / "out") == 1
    assert error in capsys.readouterr().err


def test_one_of_prompt_and_file_is_needed(tmp_path: Path, capsys: Any) -> None:
    for words in ((), ("--prompt", "a", "--prompts-file", "b.txt"), ("--prompts-file", "b.txt", "--batch-size", "all")):
        with pytest.raises(SystemExit) as stop:
            run(*words)
        assert stop.value.code == 2


def test_independent_processes_divide_small_jobs_evenly(opened: dict[str, Any], tmp_path: Path) -> None:
    line = ("--prompts-file", prompts(tmp_path, *map(str, range(10))), "--output", tmp_path / "out", "--num-processes")
    for process in range(3):
        assert run(*line, 3, "--process-id", process) == 0
    assert sorted(one["line"] for one in written(tmp_path / "out")) == [*range(1, 11)]
    assert len(list((tmp_path / "out").glob("*/metadata.jsonl"))) == 3


def joined(folder: Path, lines: int, processes: int, **environment: str) -> list[subprocess.Popen[str]]:
    """The processes of a job that JAX joins, with images from the stub."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    line = [sys.executable, "-m", "tests.batch.joined", "--output", str(folder / "out")]
    line += ["--prompts-file", str(prompts(folder, *map(str, range(lines)))), "--no-compilation-cache"]
    line += ["--coordinator-address", address, "--num-processes", str(processes), "--process-id"]
    env = {**os.environ, "XLA_FLAGS": xla_flags(2), **environment}
    return [
        subprocess.Popen([*line, str(i)], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        for i in range(processes)
    ]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_that_jax_joins_divide_the_job(tmp_path: Path, processes: int) -> None:
    """Each on its own devices; the one that is done first waits for the others. Every line has one image."""
    runs = joined(tmp_path, 12, processes)
    errors = [process.communicate(timeout=300)[1] for process in runs]
    assert [process.returncode for process in runs] == [0] * processes, "\n".join(errors)
    assert all(f"{12 // processes} images made" in text for text in errors)
    assert sorted(one["line"] for one in written(tmp_path / "out")) == [*range(1, 13)]
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (signal.SIGKILL, -9, "has not been heard of for 25 s: it has died or is cut off"),
        (signal.SIGTERM, 143, "failed: it was stopped"),
    ],
)
def test_a_joined_process_that_ends_early_ends_all_within_a_minute_and_fewer_continue(
    tmp_path: Path, sent: signal.Signals, status: int, said: str
) -> None:
    runs = joined(tmp_path, 4000, 4, PAUSE="0.5")
    deadline = time.monotonic() + 180
    while len(written(tmp_path / "out")) < 20:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    runs[2].send_signal(sent)
    killed = time.monotonic()
    errors = [process.communicate(timeout=120)[1] for process in runs]
    assert time.monotonic() - killed < 60, "\n".join(errors)
    for i in (0, 1, 3):
        assert re.search(f"process 2 of 4 on .* {said}; .*with the same command", errors[i]), errors[i]
    assert [process.returncode for process in runs] == [1, 1, status, 1]
    runs = joined(tmp_path, 4000, 2)
    errors = [process.communicate(timeout=300)[1] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], "\n".join(errors)
    assert sorted(one["line"] for one in written(tmp_path / "out")) == [*range(1, 4001)]


@pytest.mark.slow
def test_an_error_of_a_joined_process_ends_the_others_with_its_reason(tmp_path: Path) -> None:
    runs = joined(tmp_path, 4000, 2, PAUSE="0.5", FAILS="1")
    errors = [process.communicate(timeout=120)[1] for process in runs]
    assert re.search("process 1 of 2 on .* failed: there is no model; .*with the same command", errors[0]), errors[0]
    assert "there is no model" in errors[1]
    assert [process.returncode for process in runs] == [1, 1]
