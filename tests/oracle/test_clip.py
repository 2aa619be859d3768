"""Text encoders against transformers, with random weights: every output, both rules for the end of the text."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracle import twins
from tests.oracle.comparisons import LENGTH, TOLERANCE, compare_text, token_ids


@pytest.fixture(scope="module", params=twins.TEXTS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> twins.Twin:
    return twins.text_twin(request.param, tmp_path_factory.mktemp("text"))


def test_every_output_equals_transformers(encoder: twins.Twin, rng: np.random.Generator) -> None:
    differences = compare_text(encoder, token_ids(encoder[1].config, rng))
    assert max(differences.values()) <= TOLERANCE, differences


def test_attention_mask_equals_transformers(encoder: twins.Twin, rng: np.random.Generator) -> None:
    ids = token_ids(encoder[1].config, rng)
    mask = (np.arange(LENGTH)[None, :] < np.array([[5], [12], [20]])).astype(np.int32)
    differences = compare_text(encoder, ids, mask)
    assert max(differences.values()) <= TOLERANCE, differences
