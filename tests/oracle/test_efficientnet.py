"""Würstchen's image encoder against one written with ``torch.nn``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax.errors import WeightsError
from diffuse_jax.training import efficientnet_v2 as ours
from tests.oracle.comparisons import difference

twin = pytest.importorskip("tests.oracle.efficientnet", reason="needs PyTorch")
torch = twin.torch

CLASSIFIER = 1280 * 1000 + 1000
PUBLISHED = 21_458_488
"""Parameters of torchvision's efficientnet_v2_s, by its documentation, with the classifier."""


def theirs(module: Any, pixels: np.ndarray) -> np.ndarray:
    each = lambda *values: np.array(values, np.float32)
    x = (pixels / np.float32(255) - each(0.485, 0.456, 0.406)) / each(0.229, 0.224, 0.225)
    with torch.no_grad():
        return module(torch.tensor(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("wrapped", [True, False])
def test_features(wrapped: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    """From Würstchen's file, where another network is beside it, and from one of its own."""
    module = twin.tiny(4)
    both = {"state_dict": {"x": torch.zeros(1)}, ours.STATE: module.state_dict()}
    torch.save(both if wrapped else module.state_dict(), tmp_path / "effnet.pt")
    network, params = ours.read_encoder(tmp_path / "effnet.pt")
    pixels = rng.integers(0, 256, (2, 64, 96, 3), np.uint8)
    wanted = theirs(module, pixels)
    assert wanted.shape == (2, 64 // ours.SCALE, 96 // ours.SCALE, 4)
    assert wanted.std() > 0.01, "features that are all alike would prove nothing"
    assert difference(network.apply({"params": params}, pixels), wanted) < 1e-4


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(2, 2, 1, 1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"no EfficientNetV2-S with a mapper.*; 0\.0 is missing"):
        ours.read_encoder(tmp_path / "other.pt")


@pytest.mark.slow
def test_published_size(rng: np.random.Generator) -> None:
    module = twin.whole()
    assert sum(p.numel() for p in module.backbone.parameters()) == PUBLISHED - CLASSIFIER
    state = {name.removeprefix("backbone."): tensor.numpy() for name, tensor in module.state_dict().items()}
    pixels = rng.integers(0, 256, (1, 64, 64, 3), np.uint8)
    found = ours.EfficientNetEncoder().apply({"params": ours.folded(state)}, pixels)
    assert difference(found, theirs(module, pixels)) < 1e-4
