"""A run from flags to a trained model: counts, log, checkpoints, resuming, errors before anything is written."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from PIL import Image

from diffuse_jax.sharding import make_mesh
from diffuse_jax.training.batches import IndexedBatches
from diffuse_jax.training.checkpoint import checkpoints
from tests.training.line import SLOPE, arguments, line_batches, line_loss, line_mesh, points, start, train_line


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_bits(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_training_learns_the_line_and_logs_it(tmp_path: Path) -> None:
    args = arguments("--use_ema", output_dir=tmp_path, max_train_steps=200, logging_steps=20, ema_decay=0.9)
    params = train_line(args)
    np.testing.assert_allclose(params["dense"]["kernel"], SLOPE, atol=0.1)
    log = records(tmp_path)
    assert [r["step"] for r in log] == list(range(20, 201, 20))
    wanted = {"loss", "worst", "grad_norm", "learning_rate", "ema_decay", "steps_per_second"}
    assert wanted | {"images_per_second_per_device"} <= log[0].keys()
    assert log[-1]["loss"] < 0.1 * log[0]["loss"]
    assert checkpoints(tmp_path) == {}
    assert_same_bits(dict(np.load(tmp_path / "line" / "params.npz")), params["dense"])
    assert yaml.safe_load((tmp_path / "training.yaml").read_text())["ema_decay"] == 0.9


def test_resumed_run_equals_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    shared = {"mesh_fsdp": 2, "checkpointing_steps": 4, "gradient_accumulation_steps": 2}
    whole = train_line(arguments("--use_ema", output_dir=tmp_path / "whole", max_train_steps=11, **shared))
    flags = {"output_dir": tmp_path / "parts", **shared}
    train_line(arguments("--use_ema", max_train_steps=9, **flags))
    parts = train_line(arguments("--use_ema", max_train_steps=11, resume_from_checkpoint="latest", **flags))
    assert_same_bits(whole, parts)
    losses = [[(r["step"], r["loss"]) for r in records(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1], "step 9 was made twice and is in the log once"


def test_checkpoints_of_the_reference(tmp_path: Path) -> None:
    """The cases by which diffusers' scripts are tested."""
    train_line(arguments(output_dir=tmp_path, max_train_steps=5, checkpointing_steps=2))
    assert list(checkpoints(tmp_path)) == [2, 4]
    assert (tmp_path / "checkpoint-4" / "line" / "params.npz").is_file()
    flags = {"max_train_steps": 7, "checkpointing_steps": 2, "checkpoints_total_limit": 2}
    train_line(arguments(output_dir=tmp_path, resume_from_checkpoint="checkpoint-4", **flags))
    assert list(checkpoints(tmp_path)) == [4, 6]


def test_a_run_resumes_on_fewer_devices(tmp_path: Path) -> None:
    """Eight devices with fsdp, then four with data, then one: the same curve as on one device throughout."""
    size = lambda n: {"train_batch_size": 8 // n, "checkpointing_steps": 2, "logging_steps": 1}
    alone = make_mesh(devices=jax.devices()[:1])
    meshes = (make_mesh(data=1, fsdp=8), make_mesh(devices=jax.devices()[:4]), alone)
    train_line(arguments(output_dir=tmp_path / "alone", max_train_steps=6, **size(1)), mesh=alone)
    for steps, mesh in zip((2, 4, 6), meshes, strict=True):
        flags = size(mesh.devices.size) | {"max_train_steps": steps, "resume_from_checkpoint": "latest"}
        train_line(arguments(output_dir=tmp_path / "moved", **flags), mesh=mesh)
    a, b = ([r["loss"] for r in records(tmp_path / name)] for name in ("alone", "moved"))
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_latest_without_a_checkpoint_starts_from_scratch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_line(arguments(output_dir=tmp_path, max_train_steps=2, resume_from_checkpoint="latest"))
    assert "starting from step 0" in capsys.readouterr().err
    assert len(records(tmp_path)) == 2


def test_an_old_run_is_not_mixed_with_a_new_one(tmp_path: Path) -> None:
    flags = {"output_dir": tmp_path, "max_train_steps": 2, "checkpointing_steps": 1}
    train_line(arguments(**flags))
    with pytest.raises(FileExistsError, match=r"checkpoint-1, checkpoint-2.*--resume_from_checkpoint.*--overwrite"):
        train_line(arguments(**flags))
    with pytest.raises(ValueError, match="lr_warmup_steps 500"):  # a mistake in another flag costs nothing
        train_line(arguments("--overwrite_output_dir", lr_scheduler="cosine", **flags | {"lr_warmup_steps": 500}))
    assert list(checkpoints(tmp_path)) == [1, 2]
    train_line(arguments("--overwrite_output_dir", **flags | {"max_train_steps": 1}))
    assert list(checkpoints(tmp_path)) == [1]


def test_a_run_cannot_resume_towards_an_earlier_step(tmp_path: Path) -> None:
    flags = {"output_dir": tmp_path, "checkpointing_steps": 2, "resume_from_checkpoint": "latest"}
    train_line(arguments(max_train_steps=2, **flags))
    with pytest.raises(ValueError, match="checkpoint-2 has completed 2 steps, more than --max_train_steps 1"):
        train_line(arguments(max_train_steps=1, **flags))
    train_line(arguments(max_train_steps=2, **flags))  # a finished run that is started again ends at once


def test_the_run_prints_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments(output_dir=tmp_path, max_train_steps=1, gradient_accumulation_steps=2, train_batch_size=3)
    batches = line_batches(args, line_mesh(args))
    batches.total = 96  # type: ignore[attr-defined]
    train_line(args, batches=batches)
    text = capsys.readouterr().err
    for words in ("9 parameters, 8 frozen", "96", "48", "8 x cpu", "0 to 1 (0.5 epochs)"):
        assert words in text


def test_epochs_become_training_steps(tmp_path: Path) -> None:
    """20 examples in batches of 8: an epoch has three steps; ``max_train_steps`` overrides the epochs."""
    for flags, steps in (({"num_train_epochs": 2}, 6), ({"num_train_epochs": 2, "max_train_steps": 4}, 4)):
        args = arguments(output_dir=tmp_path / str(steps), validation_epochs=1, **flags)
        batches = line_batches(args, line_mesh(args))
        batches.total = 20  # type: ignore[attr-defined]
        train_line(args, batches=batches, validate=lambda params: [("", Image.new("RGB", (2, 2)))])
        assert len(records(tmp_path / str(steps))) == steps
        made = {p.name for p in (tmp_path / str(steps) / "validation").iterdir()}
        assert made == {"step-3", f"step-{steps}"}


def test_batches_of_other_shapes_are_compiled_too(tmp_path: Path) -> None:
    """As aspect-ratio buckets make them."""
    wide = lambda n: {"x": np.ones((8, 2 + n % 2, 4), np.float32)}
    loss = lambda params, frozen, batch, key: (jnp.square(batch["x"].sum((1, 2)) - params["w"]).mean(), {})
    args = arguments(output_dir=tmp_path, max_train_steps=4, learning_rate=1.0)
    params = train_line(
        args, loss=loss, trainable={"w": np.zeros(1, np.float32)}, batches=IndexedBatches(wide), export=None
    )
    assert float(params["w"][0]) > 1.0


def test_batches_that_follow_the_model_see_its_parameters(tmp_path: Path) -> None:
    """Those of every step, before its batch is asked for."""
    args, seen = arguments(output_dir=tmp_path, max_train_steps=3), []
    batches = line_batches(args, line_mesh(args))
    batches.follow = lambda params: seen.append(np.array(params["dense"]["kernel"]))  # type: ignore[attr-defined]
    train_line(args, batches=batches)
    np.testing.assert_array_equal(seen[0], start()["dense"]["kernel"])
    assert len(seen) == 3
    assert not np.array_equal(seen[1], seen[2])


def test_validation_sees_the_average(tmp_path: Path) -> None:
    seen = []
    args = arguments("--use_ema", output_dir=tmp_path, max_train_steps=5, validation_steps=2)
    last = train_line(args, validate=lambda params: seen.append(np.asarray(params["dense"]["kernel"])) or [])
    assert len(seen) == 3, "after updates 2 and 4, and at the end"
    assert_same_bits(seen[-1], last["dense"]["kernel"])


def test_the_result_is_written_before_the_last_images(tmp_path: Path) -> None:
    def validate(params: Any) -> Any:
        raise MemoryError("too many images")

    with pytest.raises(MemoryError, match="too many images"):
        train_line(arguments(output_dir=tmp_path, max_train_steps=3), validate=validate)
    assert (tmp_path / "line" / "params.npz").is_file()


def test_nothing_is_fetched_between_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value that is fetched from a device is recorded with the last batch that had been requested."""
    pytest.importorskip("tensorboard", reason="the train extra is not installed")
    args = arguments(output_dir=tmp_path, max_train_steps=12, logging_steps=6, report_to="tensorboard")
    inner = line_batches(args, line_mesh(args))
    fetched: list[int] = []
    kind = type(jnp.zeros(()))
    value = lambda self, real=kind._value: (fetched.append(inner.get_state()["batch"]), real.fget(self))[1]
    monkeypatch.setattr(kind, "_value", property(value))
    train_line(args, batches=inner, export=None)
    assert {6, 12} <= set(fetched) <= {0, 6, 12}


def broken_after(step: int) -> IndexedBatches:
    """Batches of the line; the one of ``step`` has an image that is not a number."""

    def batch(n: int) -> dict[str, np.ndarray]:
        x = points(n, 8)
        return {"x": x * (np.nan if n == step - 1 else 1.0)}

    return IndexedBatches(batch, lambda n: [f"image-{8 * n + i}.png" for i in range(8)])


def test_a_step_that_is_not_finite_is_named_with_its_batch(tmp_path: Path) -> None:
    """Found with the next record, three steps later; the last good checkpoint stays."""
    args = arguments(output_dir=tmp_path, max_train_steps=20, logging_steps=8, checkpointing_steps=4,
                     checkpoints_total_limit=1)  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"loss is nan .*at step 5\. Its batch: image-32.png, image-33"):
        train_line(args, batches=broken_after(5))
    assert list(checkpoints(tmp_path)) == [4]
    assert not (tmp_path / "line").exists(), "no model is written"
    with np.load(tmp_path / "checkpoint-4" / "line" / "params.npz") as saved:
        assert all(np.isfinite(x).all() for x in saved.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr_scheduler": "linear", "lr_warmup_steps": 9, "max_train_steps": 5}, "less than max_train_steps 5"),
        ({"resume_from_checkpoint": "checkpoint-3"}, "no checkpoint checkpoint-3"),
        ({"mesh_fsdp": 3}, "does not fit 8 devices"),
    ],
)
def test_impossible_flags_write_nothing(tmp_path: Path, flags: dict[str, Any], message: str) -> None:
    args = arguments(**{"output_dir": tmp_path / "run", "max_train_steps": 2} | flags)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_line(args)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_epochs_need_a_known_number_of_examples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="number of examples is not known: use --max_train_steps"):
        train_line(arguments(output_dir=tmp_path))


def test_rows_that_cannot_be_divided(tmp_path: Path) -> None:
    args = arguments(output_dir=tmp_path, max_train_steps=2)
    with pytest.raises(ValueError, match=r"9 rows.*1 accumulation steps times 8 devices"):
        train_line(args, batches=IndexedBatches(lambda n: {"x": points(n, 9)}))


def test_half_precision_parameters_are_refused(tmp_path: Path) -> None:
    halves = jax.tree.map(lambda x: x.astype(np.float16), start())
    with pytest.raises(ValueError, match="float16; load it as float32"):
        train_line(arguments(output_dir=tmp_path, max_train_steps=1), trainable=halves, loss=line_loss)


def test_traces_on_request(tmp_path: Path) -> None:
    args = arguments("--profile_memory", output_dir=tmp_path, max_train_steps=4, profile_steps=2)
    train_line(args)
    found = {p.name for p in (tmp_path / "profile").rglob("*") if p.is_file()}
    assert {"memory_initial.prof", "memory_final.prof"} <= found
    assert any(name.endswith(".xplane.pb") for name in found)


def rehearsed(args: Any, code: int | str = 0, **options: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        train_line(args, **options)
    assert ended.value.code == code


def test_a_dry_run_says_what_the_run_needs_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, validated = tmp_path / "run", []
    flags = {"output_dir": folder, "max_train_steps": 1000, "checkpointing_steps": 100, "validation_steps": 10}
    rehearsed(arguments("--dry_run", **flags), validate=validated.append)
    assert not folder.exists()
    assert len(validated) == 1
    text = capsys.readouterr().err
    assert "steps                    0 to 1,000" in text
    for word in ("compiling", "one step", "waiting for data", "one validation", "the whole run", "10 of 0.00 MiB each"):
        assert word in text


def test_a_dry_run_counts_data_that_is_made_in_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before every 50th of 10,000 steps."""
    args = arguments("--dry_run", output_dir=tmp_path / "run", max_train_steps=10_000)
    batches = line_batches(args, line_mesh(args))

    def batch(n: int) -> Any:
        time.sleep(0.5 if n % 50 == 0 else 0.0)
        return next(batches)

    slow = IndexedBatches(batch)
    slow.round_steps = 50  # type: ignore[attr-defined]
    rehearsed(args, batches=slow)
    text = capsys.readouterr().err
    assert re.search(r"one round +50 steps, and before them 0\.5\d* s for their data", text)
    step = re.search(r"one step +(\S+) s,", text)
    whole = re.search(r"the whole run +about (?:(\d+) h )?(\d+) min(?: (\d+) s)?", text)
    assert step is not None
    assert whole is not None
    hours, minutes, seconds = (int(part or 0) for part in whole.groups())
    assert 3600 * hours + 60 * minutes + seconds > 0.99 * (10_000 * float(step[1]) + 200 * 0.5) - 60 * bool(hours)


def test_a_dry_run_takes_the_steps_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those after a checkpoint, which stays as it is."""
    flags = {"output_dir": tmp_path, "checkpointing_steps": 2}
    train_line(arguments(max_train_steps=4, **flags))
    losses = [record["loss"] for record in records(tmp_path)]
    for words, expected in (([], losses[:2]), (["--resume_from_checkpoint", "checkpoint-2"], losses[2:])):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        capsys.readouterr()
        line = ["--overwrite_output_dir"] * (not words)
        rehearsed(arguments("--dry_run", *line, *words, max_train_steps=4, **flags))
        assert f"loss                     {', '.join(f'{loss:.4g}' for loss in expected)}" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_dry_run_refuses_what_the_run_would_refuse(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint-5"):
        train_line(
            arguments("--dry_run", output_dir=tmp_path, max_train_steps=9, resume_from_checkpoint="checkpoint-5")
        )


def test_a_dry_run_finds_that_a_disk_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    why = "the checkpoints need more space than is free; keep fewer: --checkpoints_total_limit"
    flags = {"output_dir": tmp_path, "max_train_steps": 1000, "checkpointing_steps": 100}
    rehearsed(arguments("--dry_run", **flags), why)
