"""Records: means, speeds, what reaches JSONL, TensorBoard and Weights & Biases."""

from __future__ import annotations

import datetime
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffuse_jax.training import monitor as module
from diffuse_jax.training import trackers
from diffuse_jax.training.monitor import Monitor, Work
from diffuse_jax.training.trackers import JsonLines, TensorBoard, open_trackers, wanted_trackers
from tests.training.line import arguments, train_line

RED = Image.new("RGB", (6, 4), "red")


class Kept:
    """A tracker that keeps what it gets."""

    def __init__(self) -> None:
        self.records: dict[int, dict[str, float]] = {}

    def scalars(self, step: int, record: dict[str, float]) -> None:
        self.records[step] = record

    def images(self, step: int, images: Any) -> None:
        pass

    def close(self) -> None:
        pass


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The complete lines that ``log.jsonl`` has so far."""
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def metrics(loss: float, norm: float = 1.0) -> dict[str, Any]:
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm)}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that a test controls."""

    class Clock:
        now = 100.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_means_and_speeds(clock: Any) -> None:
    """Compilation (the first step) and other work are not part of the speed."""
    kept = Kept()
    monitor = Monitor([kept], 0, 10, Work(images=32, devices=4, flops=6e12, peak=3e12), lambda n: {"learning_rate": n})
    clock.now += 60
    monitor.add(1, metrics(8.0), ())
    for step in (2, 3):
        clock.now += 2
        monitor.add(step, metrics(float(step)), ())
    monitor.flush()
    first = kept.records[3]
    assert first["loss"] == pytest.approx((8 + 2 + 3) / 3)
    assert first["learning_rate"] == 3
    assert first["steps_per_second"] == pytest.approx(0.5)
    assert first["images_per_second_per_device"] == pytest.approx(0.5 * 32 / 4)
    assert first["model_flops_utilisation"] == pytest.approx(0.5 * 6 / (3 * 4))
    with monitor.aside():
        clock.now += 1000
    clock.now += 4
    monitor.add(4, metrics(1.0), ())
    monitor.flush()
    assert kept.records[4]["steps_per_second"] == pytest.approx(0.25)
    assert kept.records[4]["loss"] == 1.0
    monitor.close()


def test_no_speed_of_a_step_that_was_compiled(clock: Any) -> None:
    kept = Kept()
    monitor = Monitor([kept], 0, 2, Work(images=1, devices=1), lambda n: {})
    for step in (1, 2):  # as with --logging_steps 1
        clock.now += 60 if step == 1 else 2
        monitor.add(step, metrics(1.0), ())
        monitor.flush()
    assert "steps_per_second" not in kept.records[1]
    assert kept.records[2]["steps_per_second"] == pytest.approx(0.5)
    monitor.close()


def test_compiling_is_not_part_of_the_speed(clock: Any) -> None:
    """As where a batch of another size is compiled in the middle of a run."""
    kept, compiled = Kept(), 0.0
    monitor = Monitor([kept], 0, 3, Work(images=1, devices=1), lambda n: {}, lambda: compiled)
    for step, seconds in ((1, 60.0), (2, 30.0), (3, 0.0)):
        clock.now += seconds + 2
        compiled += seconds
        monitor.add(step, metrics(1.0), ())
    monitor.flush()
    assert kept.records[3]["steps_per_second"] == pytest.approx(0.5)
    monitor.close()


def test_a_record_has_the_progress_of_the_run(clock: Any, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Kept()
    monitor = Monitor([kept], 0, 10, Work(images=8, devices=1, examples=32), lambda n: {})
    clock.now += 7
    monitor.add(6, metrics(0.25), ())
    monitor.flush()
    assert kept.records[6]["elapsed_seconds"] == pytest.approx(7)
    assert kept.records[6]["epoch"] == pytest.approx(1.5)
    line = capsys.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d step 6 of 10, epoch 1.50: loss 0.2500\n", line)
    monitor.close()


def test_a_log_that_cannot_be_written_is_reported_once_and_training_continues(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Full(Kept):
        def scalars(self, step: int, record: dict[str, float]) -> None:
            raise OSError("no space left")

    kept = Kept()
    monitor = Monitor([Full(), kept], 0, 2, Work(1, 1), lambda n: {})
    for step in (1, 2):
        monitor.add(step, metrics(1.0), ())
        monitor.flush()
    assert list(kept.records) == [1, 2]
    assert capsys.readouterr().err.count("warning: Full failed (OSError('no space left'))") == 1
    monitor.close()


def test_no_utilisation_of_an_unknown_device() -> None:
    kept = Kept()
    monitor = Monitor([kept], 0, 1, Work(1, 1), lambda n: {})
    monitor.add(1, metrics(1.0), ())
    assert "model_flops_utilisation" not in monitor.flush()
    monitor.close()


@pytest.mark.parametrize(("loss", "norm", "named"), [(np.nan, 1.0, "loss is nan"), (1.0, np.inf, "grad_norm is inf")])
def test_the_first_bad_step_is_named(loss: float, norm: float, named: str) -> None:
    kept = Kept()
    monitor = Monitor([kept], 0, 10, Work(1, 1), lambda n: {})
    monitor.add(6, metrics(1.0), ["good.png"])
    monitor.add(7, metrics(loss, norm), [f"{i}.png" for i in range(20)])
    monitor.add(8, metrics(np.nan), ["later.png"])
    with pytest.raises(FloatingPointError, match=rf"{named} at step 7. Its batch: 0.png, .*15.png and 4 more"):
        monitor.flush()
    assert not kept.records
    monitor.close()


def test_the_log_holds_each_step_once(tmp_path: Path) -> None:
    log = JsonLines(tmp_path, 0)
    for step in (2, 4, 6):
        log.scalars(step, {"loss": 1 / step})
    with log.path.open("a") as file:
        file.write('{"step": 8, "lo')  # the run was killed here
    again = JsonLines(tmp_path, 4)
    again.scalars(6, {"loss": 0.5})
    records = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert all(datetime.datetime.fromisoformat(record.pop("time")).tzinfo for record in records)
    assert records == [{"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25}, {"step": 6, "loss": 0.5}]


def test_images_become_files(tmp_path: Path) -> None:
    JsonLines(tmp_path, 0).images(5, [("a red/blue: thing", RED), ("", RED)])
    assert {p.name for p in (tmp_path / "validation" / "step-5").iterdir()} == {
        "00-a-red-blue-thing.png",
        "01-image.png",
    }


def test_tensorboard_reads_scalars_and_images(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoard(tmp_path, 0)
    for step in (1, 2, 3):
        writer.scalars(step, {"loss": 1 / step})
    writer.images(3, [("a prompt", RED)])
    writer.close()
    resumed = TensorBoard(tmp_path, 2)  # continues from step 2 and repeats step 3
    resumed.scalars(3, {"loss": 7.0})
    resumed.close()
    found = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (3, 7.0)]
    alone = EventAccumulator(str(sorted(tmp_path.iterdir())[0]), size_guidance={"images": 0}).Reload()
    (image,) = alone.Images("validation/00 a prompt")
    assert Image.open(io.BytesIO(image.encoded_image_string)).getpixel((0, 0)) == (255, 0, 0)
    assert "tensorflow" not in sys.modules


def test_a_run_writes_to_tensorboard_by_default(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert wanted_trackers(None) == ("tensorboard",)
    args = arguments(output_dir=tmp_path, max_train_steps=2)
    train_line(args)
    assert not (tmp_path / "logs").exists(), "report_to is none in these tests"
    args.report_to = None
    train_line(args)
    assert len(list((tmp_path / "logs").glob("events.out.tfevents.*"))) == 1


def test_a_run_draws_its_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    args = arguments(output_dir=tmp_path, max_train_steps=3, logging_steps=1)
    train_line(args)
    assert not (tmp_path / "curves.svg").exists()
    args.plot = True
    train_line(args)
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_trackers_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert wanted_trackers(None) == ()
    assert wanted_trackers("all") == ()
    for name in ("tensorboard", "wandb"):
        with pytest.raises(ImportError, match=f"--report_to {name} needs the package {name}: pip install {name}"):
            wanted_trackers(name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib: pip install \"diffusejax\[plots\]\""):
        wanted_trackers(None, plot=True)
    with pytest.raises(ValueError, match="tensorboard, wandb, none, all, got 'comet_ml'"):
        wanted_trackers("comet_ml")


def test_a_missing_tracker_stops_the_run_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install wandb"):
        train_line(arguments(output_dir=tmp_path / "run", max_train_steps=1, report_to="wandb"))
    assert not (tmp_path / "run").exists()


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a module that records its calls in place of the real one."""
    calls: list[tuple[str, Any]] = []

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            calls.append(("log", (step, values)))

        def finish(self) -> None:
            calls.append(("finish", None))

    fake = ModuleType("wandb")
    fake.init = lambda **options: calls.append(("init", options)) or Run()  # type: ignore[attr-defined]
    fake.Image = lambda image, caption: (image.size, caption)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    names = {"project": "mine", "entity": "me", "config": {"seed": 1}}
    for first in (0, 4):
        _, wandb = open_trackers(["wandb"], tmp_path, "logs", first, **names)
        wandb.scalars(first + 1, {"loss": 0.5})
        wandb.images(first + 1, [("a prompt", RED)])
        wandb.close()
    starts = [options for name, options in calls if name == "init"]
    assert starts[0]["project"] == "mine"
    assert starts[0]["config"] == {"seed": 1}
    assert starts[0]["id"] == starts[1]["id"], "a resumed run continues the same curves"
    assert ("log", (1, {"train/loss": 0.5})) in calls
    assert ("log", (5, {"validation": [((6, 4), "a prompt")]})) in calls
    _, other = open_trackers(["wandb"], tmp_path, "logs", 0, **names)
    assert calls[-1][1]["id"] != starts[0]["id"], "a new run is another one"
    other.close()
