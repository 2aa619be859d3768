"""The image normaliser of stable unCLIP against PyTorch diffusers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffuse_jax.models import StableUnCLIPImageNormalizer
from diffuse_jax.pipelines import catalogue
from tests.oracle import twins
from tests.oracle.comparisons import difference

torch = pytest.importorskip("torch")

from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer as Theirs  # noqa: E402

from diffuse_jax.torch_backend.twins import CALLS  # noqa: E402

TOLERANCE = 1e-6


@pytest.fixture
def twin(tmp_path: Path) -> twins.Twin:
    return twins.twin(Theirs(embedding_dim=24), StableUnCLIPImageNormalizer, tmp_path / "theirs")


@pytest.mark.parametrize("method", ["__call__", "unscale"])
def test_embeddings_are_scaled_as_in_diffusers(method: str, twin: twins.Twin, rng: np.random.Generator) -> None:
    module, model, params = twin
    given = rng.standard_normal((3, 24)).astype(np.float32)
    ours = model.apply({"params": params}, given, method=method)
    with torch.no_grad():
        theirs = CALLS["StableUnCLIPImageNormalizer", method](module, torch.tensor(given))
    assert difference(ours, theirs.numpy()) <= TOLERANCE
    assert np.abs(np.asarray(ours) - given).max() > 0.01


def test_a_saved_normaliser_opens_in_diffusers(twin: twins.Twin, tmp_path: Path) -> None:
    module, model, params = twin
    model.save_pretrained(tmp_path / "ours", params)
    again = Theirs.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in module.state_dict().items())
    assert catalogue.library_and_class(model) == ("stable_diffusion", "StableUnCLIPImageNormalizer")
