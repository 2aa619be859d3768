"""``diffuse-jax runs`` reads the folders of runs again and compares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffuse_jax import cli
from diffuse_jax.training.configuration import write_config
from diffuse_jax.training.runs import find_runs, read_run
from diffuse_jax.training.trackers import JsonLines


def make_run(folder: Path, losses: list[float], **flags: Any) -> Path:
    """A run's folder with a record of every tenth step."""
    write_config(folder, {"output_dir": str(folder), "seed": 0, **flags})
    log = JsonLines(folder, 0)
    for n, loss in enumerate(losses, 1):
        log.scalars(10 * n, {"loss": loss, "learning_rate": 1e-4 / n, "steps_per_second": n, "elapsed_seconds": 60 * n})
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs that differ in their learning rate, in folders of different depth."""
    make_run(tmp_path / "slow", [1.0, 0.8, 0.6], learning_rate=1e-5)
    make_run(tmp_path / "more" / "fast", [1.0, 0.2, 0.3], learning_rate=1e-3)
    return tmp_path


def test_a_table_has_what_differs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(runs), "--sort", "loss"]) == 0
    head, first, second = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[-1] == "learning_rate"
    assert "seed" not in head, "both runs have the same"
    assert "output_dir" not in head, "it only says where a run is"
    assert [first[0], second[0]] == [str(runs / "more" / "fast"), str(runs / "slow")]
    assert first[1:] == ["30", "0.3", "0.2", "3.333e-05", "2", "3", "0.001"]


def test_json_has_the_same_rows(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(runs / "slow"), str(runs / "more"), str(runs), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [Path(row["run"]).name for row in rows] == ["slow", "fast"], "each run once"
    assert [row["learning_rate"] for row in rows] == [1e-5, 1e-3]
    assert rows[0]["loss"] == 0.6


def test_the_loss_is_the_mean_over_the_last_tenth(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, [5.0] * 18 + [1.0, 2.0]))
    assert run.summary()["loss"] == 1.5


def test_curves_are_drawn(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["runs", str(runs), "--plot", str(runs / "curves.png")]) == 0
    with Image.open(runs / "curves.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 20
    assert str(runs / "curves.png") in capsys.readouterr().err


def test_a_run_without_records_or_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    JsonLines(make_run(tmp_path / "new", []), 0)
    make_run(tmp_path / "old", [0.5])
    (tmp_path / "old" / "training.yaml").unlink()
    assert cli.main(["runs", str(tmp_path), "--sort", "loss"]) == 0
    _, old, new = capsys.readouterr().out.splitlines()
    assert old.split()[1:3] == ["10", "0.5"]
    assert new.split()[1:3] == ["0", "-"]


def test_a_half_written_line_is_left_out_at_the_end_only(tmp_path: Path) -> None:
    log = make_run(tmp_path, [1.0, 0.5]) / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 30, "lo')
    assert [record["step"] for record in read_run(tmp_path).log] == [10, 20]
    log.write_text('{"st\n' + whole)
    with pytest.raises(ValueError, match=r"log.jsonl, line 1: not a record of a step: '\{\"st'"):
        read_run(tmp_path)


def test_what_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="there is no run in .*: no folder in it has a log.jsonl"):
        find_runs([tmp_path])
    with pytest.raises(FileNotFoundError, match="missing is not a folder"):
        find_runs([tmp_path / "missing"])
    make_run(tmp_path / "run", [1.0])
    assert cli.main(["runs", str(tmp_path / "run"), "--plot", str(tmp_path / "curves.nothing")]) == 1
    assert "curves.nothing: a plot is one of" in capsys.readouterr().err
    assert not (tmp_path / "curves.nothing").exists()
