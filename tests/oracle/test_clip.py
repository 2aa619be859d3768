"""Text encoders against transformers, with random weights: every output, both rules for the end of the text."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.oracle import twins

BATCH, LENGTH = 3, 20


@pytest.fixture(scope="module", params=twins.TEXTS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> twins.Twin:
    return twins.text_twin(request.param, tmp_path_factory.mktemp("text"))


def token_ids(config: Any, rng: np.random.Generator) -> np.ndarray:
    """Texts of different lengths, padded with the end token; by the old rule the largest id ends the text."""
    end = 98 if config.eos_token_id == 2 else config.eos_token_id
    ids = rng.integers(3, 96, (BATCH, LENGTH)).astype(np.int32)
    if config.eos_token_id != 2:
        ids[:, 1] = 98  # a larger id before the end must not be taken for it
    for row, length in zip(ids, (4, 11, 19)):
        row[length:] = end
    return ids


def run(twin: twins.Twin, ids: np.ndarray, mask: np.ndarray | None = None) -> tuple[Any, Any]:
    module, model, params = twin
    ours = jax.jit(lambda p, i, m: model.apply({"params": p}, i, m))(params, ids, mask)
    given = {} if mask is None else {"attention_mask": twins.torch.tensor(mask)}
    with twins.torch.no_grad():
        return ours, module(twins.torch.tensor(ids), output_hidden_states=True, **given)


def test_every_output_equals_transformers(encoder: twins.Twin, rng: np.random.Generator) -> None:
    ours, theirs = run(encoder, token_ids(encoder[1].config, rng))
    assert twins.difference(ours.last_hidden_state, theirs.last_hidden_state) <= twins.TOLERANCE
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for mine, other in zip(ours.hidden_states[:-1], theirs.hidden_states[:-1]):
        assert twins.difference(mine, other) <= twins.TOLERANCE
    if encoder[1].has_projection:
        assert twins.difference(ours.text_embeds, theirs.text_embeds) <= twins.TOLERANCE
    else:
        assert ours.text_embeds is None
        assert twins.difference(ours.pooled_output, theirs.pooler_output) <= twins.TOLERANCE


def test_clip_skip_equals_the_normalised_earlier_state(encoder: twins.Twin, rng: np.random.Generator) -> None:
    """``clip_skip`` 1 in SD 1.x: the state before the last layer, through the final norm."""
    module, model, params = encoder
    ours, theirs = run(encoder, token_ids(model.config, rng))
    mine = model.apply({"params": params}, ours.skipped(1), method="final_norm")
    norm = getattr(module, "text_model", module).final_layer_norm
    with twins.torch.no_grad():
        assert twins.difference(mine, norm(theirs.hidden_states[-2])) <= twins.TOLERANCE


def test_attention_mask_equals_transformers(encoder: twins.Twin, rng: np.random.Generator) -> None:
    ids = token_ids(encoder[1].config, rng)
    mask = (np.arange(LENGTH)[None, :] < np.array([[5], [12], [20]])).astype(np.int32)
    ours, theirs = run(encoder, ids, mask)
    assert twins.difference(ours.last_hidden_state, theirs.last_hidden_state) <= twins.TOLERANCE
