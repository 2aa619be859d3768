"""A cloud in a folder, and ``python -m tpu`` in it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tpu import cli, cloud, keep, remote

STAND_IN = Path(__file__).with_name("stand_in.py")


class Cloud:
    """A stand-in for Google's cloud."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan()

    def plan(self, **plan: Any) -> None:
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def calls(self, *words: str) -> list[str]:
        """The calls of gcloud so far, those with all of the words, as a shell would write them."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [shlex.join(["gcloud", *json.loads(line)]) for line in lines]
        return [call for call in found if all(word in call for word in words)]

    def home(self, worker: int = 0) -> Path:
        return self.folder / f"worker-{worker}"


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """The stand-in is the only gcloud on PATH, and the checkout a small one; in the end jobs are killed."""
    for name in (*remote.PACKAGE, *remote.SCRIPTS):
        path = tmp_path / "checkout" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("") if path.suffix or name.isupper() else path.mkdir()
    shutil.copy(remote.ROOT / "tpu" / "worker.py", tmp_path / "checkout" / "tpu")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "ROOT", tmp_path / "checkout")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "gcloud").write_text(f'#!/bin/sh\nexec {sys.executable} -S {STAND_IN} "$@"\n')
    (binaries / "gcloud").chmod(0o755)
    folder = tmp_path / "cloud"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{binaries}:/usr/bin:/bin")
    monkeypatch.setenv("STAND_IN", str(folder))
    made = Cloud(folder)
    yield made
    for path in folder.glob("worker-*/.diffuse-jax/jobs/*/state.json"):
        record = json.loads(path.read_text())
        for pid in (record.get("child"), record["pid"]):
            with contextlib.suppress(ProcessLookupError):
                if pid and record["state"] == "running":
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting takes hardly any time; the seconds that would have passed are in the list."""
    seconds: list[float] = []

    def sleep(amount: float) -> None:
        seconds.append(amount)
        time.sleep(0.1)

    for module in (cloud, keep):
        monkeypatch.setattr(module, "time", clock(sleep))
    return seconds


def clock(sleep: Callable[[float], object]) -> SimpleNamespace:
    """The module ``time``, with another way to sleep."""
    return SimpleNamespace(sleep=sleep, monotonic=time.monotonic)


def tpu(words: str) -> int:
    """``python -m tpu WORDS``; its exit status."""
    return cli.main(shlex.split(words))
