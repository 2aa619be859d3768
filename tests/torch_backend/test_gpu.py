"""Parity with PyTorch on CUDA; skipped where it has none. ``make test-gpu`` runs these and writes the table."""

from __future__ import annotations

import numpy as np
import pytest

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")

from benchmarks import parity as cases  # noqa: E402
from diffuse_jax import torch_backend  # noqa: E402
from diffuse_jax.torch_backend import parity  # noqa: E402
from tests.torch_backend import faults  # noqa: E402

torch = folders.torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this PyTorch sees no CUDA device"),
]

SMALL = {"num_inference_steps": 2, "height": 32, "width": 32, "seed": 0}


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: f"{case.model}, {case.dtype}")
def test_every_pipeline_is_the_same(case: cases.Case) -> None:
    row, result = cases.measure(case, "cuda", steps=4)
    assert row["same"], (result.rows, result.differences)


def test_float32_is_float32_even_where_the_process_allows_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    twin = torch_backend.from_pretrained("diffuse-jax/emoji", device="cuda")
    slow = torch_backend.from_pretrained("diffuse-jax/emoji", device="cpu")
    fast, exact = (np.asarray(pipe("a key", output_type="np", **SMALL).images) for pipe in (twin, slow))
    assert np.linalg.norm(fast - exact) / np.linalg.norm(exact) < 1e-4
    assert torch.backends.cuda.matmul.allow_tf32, "the setting of the process is its own"


def test_a_fault_is_named_on_the_gpu_too(tmp_path) -> None:
    layer = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
    shipped = parity.open_sides("diffuse-jax/emoji", device="cuda")
    bad = faults.copied(faults.SHIPPED, tmp_path / "bad", "unet", faults.permuted(f"{layer}.weight"))
    sides = shipped._replace(theirs=torch_backend.from_pretrained(bad, device="cuda"))
    result = parity.check(sides, parity.Request(["a key"], SMALL, ("unet",), bisect=True))
    assert [first["layer"] for first in result.first] == [layer]
