"""Copies of a checkpoint's components with one thing wrong, opened by PyTorch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from diffuse_jax.weights import resolve

SHIPPED = resolve("diffuse-jax/emoji")

Edit = Callable[[Path], None]
"""Changes the files of one component's folder."""


def copied(source: Path, target: Path, component: str, edit: Edit) -> Path:
    """A copy of a pipeline's folder in which ``edit`` has changed one component."""
    shutil.copytree(source, target)
    edit(target / component)
    return target


def permuted(key: str) -> Edit:
    """The rows of one tensor in another order: what a wrong conversion of attention heads gives."""

    def edit(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        tensors: dict[str, Any] = load_file(file)
        assert key in tensors, sorted(tensors)
        tensors[key] = np.ascontiguousarray(np.roll(tensors[key], 1, axis=0))
        save_file(tensors, file, metadata={"format": "pt"})

    return edit


def configured(**values: Any) -> Edit:
    """Other values in the configuration."""

    def edit(folder: Path) -> None:
        (file,) = (f for name in ("config.json", "scheduler_config.json") if (f := folder / name).exists())
        before = json.loads(file.read_text())
        assert all(before[name] != value for name, value in values.items()), "a fault must change something"
        file.write_text(json.dumps(before | values))

    return edit
