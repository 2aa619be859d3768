"""What every training script has in common: help with an example, and flags that explain themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.train.helpers import ROOT, load, run

SCRIPTS = sorted(path.name for path in (ROOT / "train").glob("*.py"))


@pytest.mark.parametrize("path", [*SCRIPTS, "emoji/make_dataset.py", "emoji/export.py"])
def test_help_has_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str) -> None:
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    monkeypatch.syspath_prepend(str(ROOT / "train" / "emoji"))
    with pytest.raises(SystemExit):
        load(path).main()
    assert f"python train/{path} --" in capsys.readouterr().out


@pytest.mark.parametrize("path", SCRIPTS)
def test_flags_that_make_no_sense_here_say_what_does(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, message in (
        ({"use_8bit_adam": True}, "--optimizer lion or adafactor"),
        ({"mixed_precision": "fp16"}, "bf16 has the range of float32"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, path, output_dir=tmp_path / "out", **flag)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
