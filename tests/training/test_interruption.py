"""Signals: whenever they come and whoever else gets them, the last finished step is saved, if there was one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diffuse_jax.training.checkpoint import checkpoints
from diffuse_jax.training.interruption import Interrupted
from tests.quick_xla import xla_flags
from tests.training.line import arguments, line_batches, line_mesh, train_line
from tests.training.test_monitor import records_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        pytest.param((signal.SIGINT,), 130, id="ctrl-c"),
        pytest.param((signal.SIGTERM, signal.SIGINT), 143, id="both", marks=pytest.mark.slow),
    ],
)
def test_signals_to_the_group_while_workers_make_data(
    numbers: tuple[signal.Signals, ...], code: int, tmp_path: Path
) -> None:
    """Terminals and cluster managers send them to all processes of a run: its slow workers must not end it."""
    output, said = tmp_path / "run", tmp_path / "said.txt"
    command = [sys.executable, str(ROOT / "tests" / "training" / "line.py"), "--output_dir", str(output)]
    command += ["--worker", "--pause", "0.2", "--max_train_steps", "1000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags()}
    with said.open("w") as file:
        run = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 120
    while not records_of(output):
        assert run.poll() is None, said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for number in numbers:
        os.killpg(run.pid, number)
        while f"{number.name} received" not in said.read_text() and run.poll() is None:
            assert time.monotonic() < deadline, "said at once"
            time.sleep(0.02)
    assert run.wait(60) == code, said.read_text()
    (made,) = checkpoints(output)
    assert made == records_of(output)[-1]["step"]
    text = said.read_text()
    assert f"{numbers[0].name} received: the run ends when the last finished step is saved" in text
    assert f"{numbers[0].name}: checkpoint-{made} is written; --resume_from_checkpoint latest continues from it" in text
    assert "Traceback" not in text
    while left := living(run.pid):
        assert time.monotonic() < deadline, f"workers that are left: {left}"
        time.sleep(0.05)


def living(group: int) -> list[str]:
    """Processes of a group, without those that have ended and are only waiting to be reaped."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    found = [line.split(None, 2) for line in listed.splitlines()]
    return [args for number, status, args in found if int(number) == group and not status.startswith("Z")]


def failing(at: int, error: Exception, number: int | None = None) -> tuple[Any, Any]:
    """Flags and batches: batch ``at`` cannot be made, perhaps because of a signal."""
    args = arguments(max_train_steps=9)
    batches = line_batches(args, line_mesh(args))
    make = batches._batch

    def batch(n: int) -> Any:
        if n != at:
            return make(n)
        try:
            if number is not None:
                signal.raise_signal(number)
        finally:
            raise error

    batches._batch = batch
    return args, batches


def test_an_error_keeps_the_last_finished_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, batches = failing(3, OSError("the disk is gone"))
    args.output_dir = str(tmp_path)
    with pytest.raises(OSError, match="the disk is gone"):
        train_line(args, batches=batches)
    assert list(checkpoints(tmp_path)) == [3]
    assert "checkpoint-3 is written" in capsys.readouterr().err


@pytest.mark.parametrize(("at", "kept"), [(3, [3]), (0, [])])
def test_an_error_after_a_signal_ends_the_run_as_the_signal_does(at: int, kept: list[int], tmp_path: Path) -> None:
    args, batches = failing(at, RuntimeError("a worker process died"), signal.SIGTERM)
    args.output_dir = str(tmp_path)
    with pytest.raises(Interrupted) as ended:
        train_line(args, batches=batches)
    assert ended.value.code == 143
    assert list(checkpoints(tmp_path)) == kept


@pytest.mark.parametrize("moment", ["validate", "export", "finish"])
def test_a_signal_at_the_end_keeps_the_last_step(
    moment: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("went on")

    with pytest.raises(Interrupted) as ended:
        train_line(arguments(output_dir=tmp_path, max_train_steps=2), **{moment: interrupt})
    assert ended.value.code == 143
    assert list(checkpoints(tmp_path)) == [2]
    assert "SIGTERM received" in capfd.readouterr().err


def test_an_exception_that_python_ignores_is_raised_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As while JAX's callback of the garbage collector runs."""

    class Garbage:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def validate(_: Any) -> Any:
        Garbage()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            pass
        raise AssertionError("went on")

    hook = sys.unraisablehook
    with pytest.raises(Interrupted) as ended:
        train_line(arguments(output_dir=tmp_path, max_train_steps=2), validate=validate)
    assert ended.value.code == 143
    assert list(checkpoints(tmp_path)) == [2]
    assert sys.unraisablehook is hook
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert said.count("SIGTERM received") == 1


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As while the step is compiled."""

    def loss(*_: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    with pytest.raises(Interrupted) as ended:
        train_line(arguments(output_dir=tmp_path, max_train_steps=2), loss=loss)
    assert ended.value.code == 130
    assert not checkpoints(tmp_path)
    assert "SIGINT received: the run ends; no step was finished, so there is nothing to save" in capfd.readouterr().err
