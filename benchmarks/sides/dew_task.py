"""Dew (``dewml``) as a contestant of ``pipeline.py``; it opens the same folder."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from serving import Contestant, count_compilations, serve


def setup() -> Contestant:
    import dew
    import jax

    task: Any = None

    def load(folder: str) -> None:
        nonlocal task
        task = dew.pipeline(folder, dtype="float32", param_dtype="float32")
        jax.block_until_ready(task.variables)

    def draw(prompts: list[str], steps: int, guidance: float, seed: int) -> Any:
        return task(prompts, steps=steps, guidance=guidance, key=seed).pil()

    name = f"Dew {importlib.metadata.version('dewml')}"
    return Contestant(name, {"load": load, "draw": draw}, count_compilations())


if __name__ == "__main__":
    serve(setup)
