"""What every training script has in common: help with an example, and flags that explain themselves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffuse_jax.training.flags import Parser, Refused
from tests.test_docs_commands import parser_of
from tests.train.helpers import ROOT, load, run

OF_SOME = {
    "mask_column": ({"text_to_image", "dreambooth"}, "here has no masks|there are no training images"),
    "shuffle_tags": (
        {"text_to_image", "controlnet", "t2i_adapter", "lcm_distillation"},
        "not lists of tags here|there are no training images",
    ),
}
"""Flag -> the scripts that have it, those with LoRA besides, and what the others say."""
SIGNED = {"mesh_data", "p_mean", "logit_mean", "mode_scale"}
"""Flags that -1 means something for: of a mesh, all devices that remain."""
SCRIPTS = sorted(path.name for path in (ROOT / "train").glob("*.py"))
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("path", [*SCRIPTS, "emoji/make_dataset.py", "emoji/export.py"])
def test_help_has_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str) -> None:
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    monkeypatch.syspath_prepend(str(ROOT / "train" / "emoji"))
    with pytest.raises(SystemExit):
        load(path).main()
    assert f"python train/{path} --" in capsys.readouterr().out


def test_help_loads_neither_jax_nor_networks() -> None:
    """So it answers at once; one process asks all scripts."""
    emoji = [path for path in (ROOT / "train" / "emoji").glob("*.py") if "argparse" in path.read_text(encoding="utf-8")]
    scripts = [*SCRIPTS, *(f"emoji/{path.name}" for path in emoji)]
    code = f"""
import runpy, sys
sys.path.insert(0, "train/emoji")
for script in {scripts}:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path("train/" + script, run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0, script
    loaded = [m for m in ("jax", "flax", "optax", "transformers", "datasets", "orbax") if m in sys.modules]
    assert not loaded, (script, loaded)
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("most used:") == len(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_bounds(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = Parser.parse_args
    parser = parser_of(f"train/{script}", monkeypatch)
    actions = [action for action in parser._actions if action.option_strings and action.nargs != 0]
    assert not [a.dest for a in actions if a.type in (int, float)], "give these a Number"
    numeric = [a for a in actions if a.metavar in ("N", "X")]
    assert len(numeric) > 25
    for action in numeric:
        for text in ("-1", "nan", "inf", "-inf", "1e999", "9" * 5000, "many", ""):
            if text == "-1" and action.dest in SIGNED:
                continue
            with pytest.raises(SystemExit) as ended:
                parse(parser, [f"{action.option_strings[0]}={text}"])
            assert ended.value.code == 2
            message = capsys.readouterr().err.splitlines()[0]
            assert re.search(rf"argument {action.option_strings[0]}\b.*: must be a .*number", message)
            assert message.endswith(f", got {text[:80] or repr(text)}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_path_is_empty(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It would mean the current folder; and a leading ~ is the home folder."""
    parse = Parser.parse_args
    parser = parser_of(f"train/{script}", monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    named = re.compile(r"_(dir|path|image|shards)$|^(config|ccache|dataset_name|resume_from_checkpoint)$")
    paths = [a for a in parser._actions if named.search(a.dest) and a.nargs != 0 and not isinstance(a, Refused)]
    assert len(paths) > 8
    for action in paths:
        flag = action.option_strings[0]
        for text in ("", " "):
            with pytest.raises(SystemExit) as ended:
                parse(parser, [f"{flag}={text}"])
            assert ended.value.code == 2
            assert f"argument {flag}" in (said := capsys.readouterr().err)
            assert "a path must not be empty; the current folder is '.'" in said
        assert action.type("~/x") == str(tmp_path / "x")  # type: ignore[operator, misc]


def test_help_into_a_pipe_that_nobody_reads_ends_silently() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "train" / "vae.py"), "--help"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    os.close(writer)
    assert ended.returncode in (0, 141)  # argparse ignores the error where the text is longer than a buffer
    assert ended.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_while_jax_is_loaded(number: signal.Signals, tmp_path: Path) -> None:
    """A module named jax that never finishes importing stands in for a slow disk."""
    (tmp_path / "jax.py").write_text("import time\ntime.sleep(60)\n")
    command = [sys.executable, str(ROOT / "train" / "unconditional.py"), "--output_dir", str(tmp_path / "out")]
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    run = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    first = run.stderr.readline()
    assert first == "loading JAX and the library\n"
    run.send_signal(number)
    said = run.stderr.read()
    assert run.wait(20) == 128 + number
    assert f"{number.name} received: the run ends; no step was finished, so there is nothing to save" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("path", SCRIPTS)
def test_flags_that_cannot_be_used_say_what_to_do(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a word of its own, and as one with its value."""
    for flag, message in (
        ({"use_8bit_adam": True}, "--optimizer lion or adafactor"),
        ({"use_8bit_adam=1": True}, "--optimizer lion or adafactor"),
        ({"mixed_precision": "fp16"}, "bf16 has the range of float32"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, path, output_dir=tmp_path / "out", **flag)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", OF_SOME)
@pytest.mark.parametrize("path", SCRIPTS)
def test_what_a_script_would_ignore_is_refused_by_name(
    path: str, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = Parser.parse_args
    parser = parser_of(f"train/{path}", monkeypatch)
    has, message = OF_SOME[flag]
    if path.removesuffix(".py").removesuffix("_lora") in has:
        assert not isinstance(parser._option_string_actions[f"--{flag}"], Refused)
        return
    for words in ([f"--{flag}", "mask"], [f"--{flag}=mask"]):
        with pytest.raises(SystemExit):
            parse(parser, words)
        assert re.search(f"--{flag}: .*({message})", capsys.readouterr().err)
