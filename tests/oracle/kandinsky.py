"""What the tests of Kandinsky's decoders share: embeddings, a pipeline in both libraries, and their comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.pipelines.programs import Programs
from tests.oracle.agreement import require_same

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")

torch, diffusers = folders.torch, folders.diffusers

EDGE = 64
SHORT = {"num_inference_steps": 3, "height": EDGE, "width": EDGE}


def embeddings(count: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    draw = lambda: rng.standard_normal((count, 32)).astype(np.float32)
    return {"image_embeds": draw(), "negative_image_embeds": draw()}


def opened_from(write: Callable[..., Path], name: str, folder: Path, **changes: Any) -> tuple[Any, Any]:
    """The pipeline here, whose programs are counted, and in PyTorch; ``write`` makes the folder."""
    write(folder, name, **changes)
    twin = getattr(diffusers, name).from_pretrained(folder)
    twin.set_progress_bar_config(disable=True)
    pipe = DiffusionPipeline.from_pretrained(folder).replace(programs=Programs())
    assert type(pipe).__name__ == name
    return pipe, twin


def compare(pipe: Any, twin: Any, theirs: dict[str, Any] | None = None, seed: int = 5, **request: Any) -> None:
    tensors = {name: torch.tensor(request[name]) for name in ("image_embeds", "negative_image_embeds")}
    given = request | tensors | (theirs or {})
    with torch.no_grad():
        wanted = twin(generator=torch.Generator().manual_seed(seed), output_type="np", **given).images
    ours = pipe(seed=seed, noise="torch", output_type="np", **request).images
    require_same(pipe, ours, wanted)
