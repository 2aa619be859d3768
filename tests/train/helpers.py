"""What the tests of all training scripts share: running one from its command line, and reading what it wrote."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from diffuse_jax.sharding import make_mesh

ROOT = Path(__file__).resolve().parents[2]
EMOJI = ROOT / "tests" / "data" / "emoji"
"""Twelve real images of 64 pixels, with captions."""


def load(path: str) -> ModuleType:
    """A script of ``train/`` as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "train" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(monkeypatch: pytest.MonkeyPatch, path: str, *, devices: int | None = None, **flags: Any) -> None:
    """A script from its command line: True is a switch, a list several values.

    Long runs of tiny networks take the first ``devices``, as eight virtual ones mostly wait for each other.
    """
    values = {name: value if isinstance(value, list) else [value] for name, value in flags.items()}
    words = [[f"--{name}", *(str(v) for v in own if v is not True)] for name, own in values.items()]
    monkeypatch.setattr(sys, "argv", [path, *itertools.chain(*words)])
    script = load(path)
    if devices is not None:
        script.mesh_from = lambda args: make_mesh(devices=jax.devices()[:devices])  # type: ignore[attr-defined]
    script.main()


def log(folder: Path, name: str = "loss") -> list[float]:
    """The values of that name in ``log.jsonl``."""
    return [json.loads(line)[name] for line in (folder / "log.jsonl").read_text().splitlines()]


def numbers(folder: Path, kind: type, part: str) -> list[np.ndarray]:
    """The parameters of a network in a folder."""
    return [np.asarray(x) for x in jax.tree.leaves(kind.from_pretrained(folder, subfolder=part)[1])]  # type: ignore[attr-defined]
