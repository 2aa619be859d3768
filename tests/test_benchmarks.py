"""The end-to-end benchmark runs, and what it counts is what the library promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


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
